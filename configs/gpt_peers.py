"""The GPT that the step benchmark compares with other frameworks: 6 layers, 6 heads, 384 wide, T=256, batch 8, AdamW.

python -m benchmarks step configs/gpt_peers.py
"""

from jaxmodels.config import CheckpointConfig, Config, DataConfig, OptimConfig, TrainConfig
from jaxmodels.models.gpt2 import GPT2Config


def get_config() -> Config:
    return Config(
        model=GPT2Config(vocab_size=65, context=256, layers=6, heads=6, width=384, remat="dots"),
        data=DataConfig(source="synthetic", seq_len=256, batch_size=8),
        optim=OptimConfig(peak_lr=1e-3, schedule="constant"),
        train=TrainConfig(steps=100),
        checkpoint=CheckpointConfig(every=0),
    )
