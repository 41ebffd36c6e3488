from own_task import Regression

from jaxmodels.config import Config, Images, Train
from jaxmodels.models.cnn import CNNConfig


def get_config() -> Config:
    return Config(
        model=CNNConfig(input_shape=(16, 16, 3), classes=1),
        task=Regression(power=2.0),
        data=Images(path=("photos",), eval_fraction=0.3, batch_size=8),
        train=Train(steps=4),
    )
