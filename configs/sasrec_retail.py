"""SASRec on the purchases of a web shop: what a customer buys next, split by time.

    jaxmodels train configs/sasrec_retail.py --data.path DIR/interactions.csv --data.items DIR/items.csv

DIR is a folder with the tables of UCI's Online Retail.
"""

from jaxmodels.config import AdamW, Config, Eval, Interactions, NextItem, Train
from jaxmodels.models.sasrec import SASRecConfig


def get_config() -> Config:
    return Config(
        model=SASRecConfig(vocab_size=3145, context=64, heads=2, width=64, mlp_width=128, dropout=0.3),
        task=NextItem(horizon=20, half_life=30.0),
        data=Interactions(
            path=("interactions.csv",),
            items=("items.csv",),
            eval_from="2011-11-01",
            seq_len=64,
            batch_size=128,
        ),
        optim=AdamW(peak_lr=2e-3, b2=0.98, warmup_steps=50, weight_decay=0.0),
        train=Train(steps=600),
        eval=Eval(every=0, batch_size=256),
    )
