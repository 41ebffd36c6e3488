"""BERT-base on the English Wikipedia: masked language modeling on documents packed into rows of 512 tokens.

    jaxmodels train configs/bert_base_wikipedia.py --data.tokenizer BERT_TOKENIZER_JSON

Not yet run. The tokenizer is that of bert-base-uncased: 101, 102 and 0 are [CLS], [SEP] and [PAD], 103 is [MASK].
"""

from jaxmodels.config import TFDS, AdamW, Config, Eval, Linear, MaskedLM, Train
from jaxmodels.models.bert import BERTConfig


def get_config() -> Config:
    return Config(
        model=BERTConfig(vocab_size=30522, dtype="bfloat16"),
        task=MaskedLM(mask_token=103, keep=(0, 101, 102)),
        data=TFDS(
            name="wikipedia/20230601.en",
            input_field="text",
            train_split="train[:99%]",
            eval_split="train[99%:]",
            tokenizer="tokenizer.json",
            seq_len=512,
            pack=True,
            batch_size=256,
        ),
        optim=AdamW(
            peak_lr=1e-4, b2=0.999, warmup_steps=10_000, weight_decay=0.01, schedule=Linear(final_lr_fraction=0.0)
        ),
        train=Train(steps=1_000_000),
        eval=Eval(every=10_000, batches=100),
    )
