"""The base Transformer of Vaswani et al. 2017 from English to German on WMT 2014.

    jaxmodels data train-tokenizer 'wmt14/*.txt' --vocab-size 37000 --out wmt14/tokenizer.json     # both languages
    jaxmodels train configs/transformer_wmt14.py --data.tokenizer wmt14/tokenizer.json

Not yet run. Published: BLEU 27.3 on newstest2014 after 100,000 steps. Here the learning rate decays along a cosine.
"""

import dataclasses

from jaxmodels.config import TFDS, AdamW, Config, Eval, Seq2Seq, Train
from jaxmodels.models.families import preset


def get_config() -> Config:
    return Config(
        model=dataclasses.replace(preset("transformer-base"), vocab_size=37_000, dtype="bfloat16"),
        task=Seq2Seq(label_smoothing=0.1),
        data=TFDS(
            name="wmt14_translate/de-en",
            input_field="en",
            target_field="de",
            tokenizer="tokenizer.json",
            seq_len=256,
            pack=True,
            batch_size=128,
        ),
        optim=AdamW(peak_lr=7e-4, b2=0.98, eps=1e-9, warmup_steps=4000, weight_decay=0.0, clip_norm=None),
        train=Train(steps=100_000, ema=0.999),
        eval=Eval(every=5000),
    )
