"""BERT-base on SQuAD 1.1: questions about passages of Wikipedia, 87,599 to train on.

    jaxmodels train configs/bert_squad.py --data.path train-v1.1.json --data.eval-path dev-v1.1.json \
        --init.source BERT_BASE_UNCASED --data.tokenizer BERT_BASE_UNCASED

Not yet run. Published: an exact match of 80.8 % and an F1 of 88.5 % (Devlin et al. 2018, table 2, of a single model).
BERT_BASE_UNCASED is its folder in Hugging Face's format. For SQuAD 2.0, add --task.unanswerable True.
"""

from jaxmodels.config import AdamW, Checkpoint, Config, Eval, Init, Linear, QuestionAnswering, SQuAD, Train
from jaxmodels.models.bert import BERTConfig


def get_config() -> Config:
    return Config(
        model=BERTConfig(head="spans", dtype="bfloat16"),
        task=QuestionAnswering(),
        data=SQuAD(
            path=("train-v1.1.json",),
            eval_path=("dev-v1.1.json",),
            tokenizer="bert-base-uncased",
            seq_len=384,
            batch_size=32,
        ),
        optim=AdamW(
            peak_lr=5e-5, b2=0.999, warmup_steps=830, weight_decay=0.01, schedule=Linear(final_lr_fraction=0.0)
        ),
        train=Train(steps=8300),
        eval=Eval(every=2075, batch_size=128, metric="eval/f1", mode="max"),
        checkpoint=Checkpoint(best=True),
        init=Init(source="bert-base-uncased", fresh=("spans/*",)),
    )
