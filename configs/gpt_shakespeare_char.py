"""A character-level GPT on Tiny Shakespeare, with nanoGPT's settings for a CPU.

    jaxmodels train configs/gpt_shakespeare_char.py --data.dir DIR

DIR is a TFDS data directory. The last tenth of the text (validation and test together) is held out, as
nanoGPT does; its README reports a loss of 1.88 there. Reached: 1.767 in 1.5 minutes on two CPU cores, with a
peak learning rate of 3e-3 (1.900 with nanoGPT's 1e-3, 1.615 with --optim muon); benchmarks/results/quality.md.
"""

from jaxmodels.config import TFDS, AdamW, Config, Eval, Train
from jaxmodels.models.gpt2 import GPT2Config


def get_config() -> Config:
    return Config(
        model=GPT2Config(vocab_size=65, context=64, layers=4, heads=4, width=128),
        data=TFDS(
            name="tiny_shakespeare",
            eval_split="validation+test",
            tokenizer="chars",
            seq_len=64,
            batch_size=12,
        ),
        optim=AdamW(peak_lr=3e-3, b2=0.99, warmup_steps=100),
        train=Train(steps=2000),
        eval=Eval(every=500, batch_size=128),
    )
