from own_model import DenseConfig

from jaxmodels.config import Classification, Config, Images, Train


def get_config() -> Config:
    return Config(
        model=DenseConfig(input_shape=(16, 16, 3), classes=2),
        task=Classification(),
        data=Images(path=("photos",), eval_fraction=0.3, batch_size=8),
        train=Train(steps=4),
    )
