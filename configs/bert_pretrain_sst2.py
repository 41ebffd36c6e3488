"""A small BERT that learns to restore masked words of SST-2's sentences, unlabeled, and of Multi30k's English.

    jaxmodels train configs/bert_pretrain_sst2.py --data.dir DIR     # a TFDS data directory

Reached on held-out sentences: a loss of 3.12 nats per masked word, 47.7 % of them restored, in 35.1 minutes on two CPU
cores; benchmarks/results/quality.md.
"""

from jaxmodels.config import TFDS, Config, Eval, Linear, MaskedLM, Muon, Train
from jaxmodels.models.bert import BERTConfig

MODEL = BERTConfig(
    vocab_size=8001, context=64, layers=4, heads=4, width=128, mlp_width=512, dropout=0.1, norm_eps=1e-6, unroll=4
)


def get_config() -> Config:
    return Config(
        model=MODEL,
        # the last id of the vocabulary, which the tokenizer does not use, stands for what is masked; id 0 begins a text
        task=MaskedLM(mask_fraction=0.2, keep=(0,)),
        data=TFDS(
            name="sst2+multi30k",
            input_field="sentence+en",
            tokenizer="words:8000",
            seq_len=64,
            pack=True,
            batch_size=64,
        ),
        optim=Muon(peak_lr=4e-3, warmup_steps=100, schedule=Linear(final_lr_fraction=0.01)),
        train=Train(steps=5000),
        eval=Eval(every=500),
    )
