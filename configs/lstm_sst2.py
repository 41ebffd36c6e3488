"""A bidirectional LSTM on the sentences of SST-2, with randomly initialized word vectors.

    jaxmodels train configs/lstm_sst2.py --data.dir DIR     # a TFDS data directory
    jaxmodels eval runs/lstm_sst2 --best --split test

Reached on the 6,920 sentences of SST-2, tested on its 1,821: accuracy 81.27% in 1.1 minutes, on two CPU cores;
benchmarks/results/quality.md.
"""

from jaxmodels.config import TFDS, AdamW, Checkpoint, Classification, Config, Eval, Linear, Train
from jaxmodels.models.lstm import LSTMConfig


def get_config() -> Config:
    return Config(
        model=LSTMConfig(vocab_size=12000, width=128, hidden=128, layers=1, bidirectional=True, classes=2, dropout=0.6),
        task=Classification(),
        data=TFDS(name="sst2", tokenizer="words:12000", seq_len=48, batch_size=64),
        optim=AdamW(peak_lr=2e-3, b2=0.99, warmup_steps=50, weight_decay=0.1, schedule=Linear(final_lr_fraction=0.01)),
        train=Train(steps=900, ema=0.99),
        eval=Eval(every=100, batch_size=128, metric="eval/accuracy", mode="max"),
        checkpoint=Checkpoint(best=True),
    )
