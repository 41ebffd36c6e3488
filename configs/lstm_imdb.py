"""A bidirectional LSTM on the reviews of IMDb, with randomly initialized word vectors.

    jaxmodels train configs/lstm_imdb.py     # imdb_reviews, prepared by TFDS as array_record

Not yet run.
"""

from jaxmodels.config import TFDS, AdamW, Checkpoint, Classification, Config, Eval, Linear, Train
from jaxmodels.models.lstm import LSTMConfig


def get_config() -> Config:
    return Config(
        model=LSTMConfig(
            vocab_size=20_000, width=256, hidden=256, layers=1, bidirectional=True, classes=2, dropout=0.5
        ),
        task=Classification(),
        data=TFDS(name="imdb_reviews", eval_split="test", tokenizer="words:20000", seq_len=400, batch_size=128),
        optim=AdamW(peak_lr=1e-3, b2=0.999, warmup_steps=100, schedule=Linear(final_lr_fraction=0.01)),
        train=Train(steps=2000, ema=0.99),
        eval=Eval(every=200, metric="eval/accuracy", mode="max"),
        checkpoint=Checkpoint(best=True),
    )
