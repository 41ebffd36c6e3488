"""The sentence that sums up the abstract of a paper, chosen by MiniLM-L6 (22M parameters), a small BERT.

    jaxmodels train configs/bert_scitldr.py --data.path DIR/train.jsonl --data.eval-path DIR/validation.jsonl \
        --init.source MINILM --data.tokenizer MINILM
    jaxmodels eval runs/bert_scitldr --best --data.path DIR/test.jsonl

Not yet run. To reach: a ROUGE-1 of 36 % on the test set, where the first sentence has 31.3 % and the best one 49.3 %.
DIR is a folder of SciTLDR's abstracts, with 1,992 to train on; MINILM as in `bert_wiki_questions`.
"""

import dataclasses

from bert_wiki_questions import MODEL

from jaxmodels.config import AdamW, Checkpoint, Config, Eval, Extraction, Init, Linear, Table, Train


def get_config() -> Config:
    return Config(
        model=dataclasses.replace(MODEL, head="sentences"),
        task=Extraction(sentences=1, most=32),
        data=Table(
            path=("train.jsonl",),
            eval_path=("validation.jsonl",),
            input_field="source",
            label_field="source_labels",
            target_field="target",
            tokenizer="minilm",
            seq_len=320,
            batch_size=16,
        ),
        optim=AdamW(peak_lr=1e-4, b2=0.999, warmup_steps=25, schedule=Linear(final_lr_fraction=0.0)),
        train=Train(steps=375),
        eval=Eval(every=125, batch_size=32, metric="eval/rouge1", mode="max"),
        checkpoint=Checkpoint(best=True),
        init=Init(source="minilm", fresh=("sentences/*",)),
    )
