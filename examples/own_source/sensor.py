from own_source import Readings

from jaxmodels.config import Classification, Config, Train
from jaxmodels.models.mlp import MLPConfig


def get_config() -> Config:
    return Config(
        model=MLPConfig(input_shape=(3,), classes=2, hidden=(8,)),
        task=Classification(),
        data=Readings(batch_size=8),
        train=Train(steps=4),
    )
