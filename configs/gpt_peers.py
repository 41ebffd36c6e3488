"""The GPT that the step benchmark compares with other frameworks: 6 layers, 6 heads, 384 wide, T=256, batch 8, AdamW.

python -m benchmarks step configs/gpt_peers.py
"""

from jaxmodels.config import AdamW, Checkpoint, Config, Constant, Synthetic, Train
from jaxmodels.models.gpt2 import GPT2Config


def get_config() -> Config:
    return Config(
        model=GPT2Config(vocab_size=65, context=256, layers=6, heads=6, width=384, remat="dots"),
        data=Synthetic(seq_len=256, batch_size=8),
        optim=AdamW(peak_lr=1e-3, schedule=Constant()),
        train=Train(steps=100),
        checkpoint=Checkpoint(every=0),
    )
