from jaxmodels.config import Config, Stdlib, Train
from jaxmodels.models.gpt2 import GPT2Config


def get_config() -> Config:
    return Config(
        model=GPT2Config(vocab_size=256, context=16, layers=1, heads=2, width=16),
        data=Stdlib(seq_len=16, batch_size=8),
        train=Train(steps=2),
    )
