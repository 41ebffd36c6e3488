"""The encoder-decoder Transformer, small, from English to German on Multi30k.

    jaxmodels train configs/transformer_multi30k.py --data.dir DIR     # a TFDS data directory with multi30k
    jaxmodels eval runs/transformer_multi30k --split test              # BLEU, with a beam of 4

Reached on Multi30k's 29,000 pairs, tested on test_2016_flickr: sacreBLEU 39.17 in 17.8 minutes on two CPU cores;
benchmarks/results/quality.md.
"""

from jaxmodels.config import TFDS, Checkpoint, Config, Eval, Linear, Muon, Seq2Seq, Train
from jaxmodels.models.transformer import TransformerConfig


def get_config() -> Config:
    return Config(
        model=TransformerConfig(
            vocab_size=8000, layers=3, width=128, heads=4, mlp_width=384, norm="pre", dropout=0.1, unroll=3
        ),
        task=Seq2Seq(label_smoothing=0.1),
        data=TFDS(
            name="multi30k",
            input_field="en",
            target_field="de",
            tokenizer="bpe:8000",
            seq_len=64,
            pack=True,
            batch_size=32,
        ),
        optim=Muon(peak_lr=6e-3, b2=0.98, warmup_steps=100, schedule=Linear(final_lr_fraction=0.01)),
        train=Train(steps=2600),
        eval=Eval(every=650),
        checkpoint=Checkpoint(every=500),
    )
