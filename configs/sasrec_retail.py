"""SASRec on the purchases of a web shop: what a customer buys next, split by time.

    jaxmodels train configs/sasrec_retail.py --data.path DIR/interactions.csv --data.items DIR/items.csv

DIR is a folder with the tables of UCI's Online Retail.
"""

from jaxmodels.config import Adam, Config, Eval, Interactions, NextItem, Train
from jaxmodels.models.sasrec import SASRecConfig


def get_config() -> Config:
    return Config(
        model=SASRecConfig(vocab_size=3145, context=32, heads=2, width=64, mlp_width=128, dropout=0.2),
        task=NextItem(horizon=20, half_life=10.0, places=8),
        data=Interactions(
            path=("interactions.csv",),
            items=("items.csv",),
            eval_from="2011-11-01",
            seq_len=32,
            batch_size=64,
        ),
        optim=Adam(peak_lr=4e-3, b2=0.98, warmup_steps=50),
        train=Train(steps=800),
        eval=Eval(every=0, batch_size=256),
    )
