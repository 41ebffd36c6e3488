"""Two towers on the purchases of a web shop: histories and names of items, what a customer buys next, split by time.

    jaxmodels train configs/two_tower_retail.py --data.path DIR/interactions.csv --data.items DIR/items.csv

DIR is a folder with the tables of UCI's Online Retail. Reached: NDCG@10 0.109, HR@10 0.476 over all items (EASE: 0.103,
0.474), in 100 steps, less than a minute on two busy CPU cores; benchmarks/results/applications.md. The number of steps
and the half-life were chosen on October: with more steps the model learns its few recent weeks by heart.
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
        train=Train(steps=100),
        eval=Eval(every=0),
    )
