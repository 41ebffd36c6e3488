"""SASRec on MovieLens-20M: which film a user rates next, the last one of each left out.

    jaxmodels train configs/sasrec_movielens.py --data.path DIR/ratings.csv --data.items DIR/movies.csv

Not yet run. DIR is the folder of ml-20m; the settings are the paper's for MovieLens-1M, with the softmax over 1,024
drawn items in place of its one negative.
"""

from jaxmodels.config import Adam, Config, Eval, Interactions, NextItem, Train
from jaxmodels.models.sasrec import SASRecConfig


def get_config() -> Config:
    return Config(
        model=SASRecConfig(vocab_size=27_278, context=200, width=64, dropout=0.2, dtype="bfloat16"),
        task=NextItem(negatives=1024),
        data=Interactions(
            path=("ratings.csv",),
            items=("movies.csv",),
            user_field="userId",
            item_field="movieId",
            time_field="timestamp",
            name_field="title",
            seq_len=200,
            batch_size=1024,
        ),
        optim=Adam(peak_lr=1e-3, b2=0.98, warmup_steps=1000),
        train=Train(steps=50_000),
        eval=Eval(every=5000, metric="eval/ndcg@10", mode="max"),
    )
