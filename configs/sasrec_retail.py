"""SASRec on the purchases of a web shop: what a customer buys next, split by time.

    jaxmodels train configs/sasrec_retail.py --data.path DIR/interactions.csv --data.items DIR/items.csv

DIR is a folder with the tables of UCI's Online Retail. Reached: NDCG@10 0.097, HR@10 0.455 over all items (EASE: 0.103,
0.474), after 3 minutes on two busy CPU cores; benchmarks/results/applications.md.
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
        train=Train(steps=446),
        eval=Eval(every=0, batch_size=256),
    )
