"""The BERT of `bert_pretrain_sst2`, fine-tuned to tell good reviews from bad ones on SST-2.

    jaxmodels train configs/bert_sst2.py --data.dir DIR                      # after bert_pretrain_sst2
    jaxmodels train configs/bert_sst2.py --data.dir DIR --init.source None --optim.layer-decay 1   # from scratch
    jaxmodels eval runs/bert_sst2 --best --split test

Reached on 6,920 training and 1,821 test sentences, means of three seeds: an accuracy of 81.35 % in 0.9 minutes after
35.1 of pre-training, and from scratch 80.23 %. On two CPU cores; benchmarks/results/quality.md. On a full set: not run.
"""

import dataclasses

from bert_pretrain_sst2 import MODEL

from jaxmodels.config import TFDS, AdamW, Checkpoint, Classification, Config, Eval, Init, Linear, Train


def get_config() -> Config:
    return Config(
        model=dataclasses.replace(MODEL, head="classification", classes=2, pool="mean", dropout=0.2),
        task=Classification(),
        data=TFDS(name="sst2", tokenizer="runs/bert_pretrain_sst2", seq_len=40, batch_size=32),
        optim=AdamW(peak_lr=8e-4, b2=0.99, warmup_steps=60, layer_decay=0.95, schedule=Linear(final_lr_fraction=0.01)),
        train=Train(steps=432),
        eval=Eval(every=72, batch_size=128, metric="eval/accuracy", mode="max"),
        checkpoint=Checkpoint(best=True),
        init=Init(source="runs/bert_pretrain_sst2", fresh=("head/*", "pooler/*")),
    )
