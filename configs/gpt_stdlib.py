"""A small GPT on the source code of Python's own standard library, byte by byte: what `make train` runs.

    jaxmodels train configs/gpt_stdlib.py

On two CPU cores: 3.4 minutes, loss 1.350 nats per byte on 100 batches of files it has not seen, 1.426 on all of them (a
unigram model: 3.131), with Python 3.11's standard library; benchmarks/results/quality.md.
"""

from jaxmodels.config import Config, Cosine, Eval, Muon, Stdlib, Train
from jaxmodels.models.gpt2 import GPT2Config


def get_config() -> Config:
    return Config(
        model=GPT2Config(vocab_size=256, context=256, layers=4, heads=4, width=128),
        data=Stdlib(seq_len=256, batch_size=8),
        optim=Muon(peak_lr=4e-3, warmup_steps=50, schedule=Cosine(final_lr_fraction=0.02)),
        train=Train(steps=1000),
        eval=Eval(every=250, batches=100),
    )
