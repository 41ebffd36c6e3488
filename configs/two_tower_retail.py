"""Two towers on the purchases of a web shop: histories and names of items, what a customer buys next, split by time.

    jaxmodels train configs/two_tower_retail.py --data.path DIR/interactions.csv --data.items DIR/items.csv

DIR is a folder with the tables of UCI's Online Retail.
"""

from jaxmodels.config import Adam, Config, Eval, Interactions, Train
from jaxmodels.models.two_tower import TwoTowerConfig
from jaxmodels.tasks.retrieval import Retrieval


def get_config() -> Config:
    return Config(
        model=TwoTowerConfig(vocab_size=3145, width=64, words=2048, name_words=6),
        task=Retrieval(half_life=10.0),
        data=Interactions(
            path=("interactions.csv",),
            items=("items.csv",),
            eval_from="2011-11-01",
            seq_len=24,
            batch_size=512,
        ),
        optim=Adam(peak_lr=1e-2, warmup_steps=20),
        train=Train(steps=800),
        eval=Eval(every=0),
    )
