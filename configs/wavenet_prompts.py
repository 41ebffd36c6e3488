"""WaveNet on telephone prompts of one speaker, sample by sample at 8,000 a second.

    jaxmodels train configs/wavenet_prompts.py --data.path index.jsonl     # a table that names sound files and splits
    jaxmodels sample runs/wavenet_prompts --seconds 2 --out said.wav

For the 409 prompts (13 minutes) of Asterisk's sounds. Not trained here: benchmarks/results/applications.md.
"""

from jaxmodels.config import AdamW, Config, Cosine, Eval, Table, Train, Waveform
from jaxmodels.models.wavenet import WaveNetConfig


def get_config() -> Config:
    return Config(
        model=WaveNetConfig(),
        task=Waveform(),
        data=Table(files=("file",), split_field="split", eval_split="test", seq_len=4096, batch_size=4),
        optim=AdamW(peak_lr=4e-3, b2=0.99, warmup_steps=50, weight_decay=0.0, schedule=Cosine(final_lr_fraction=0.02)),
        train=Train(steps=4000, ema=0.99),
        eval=Eval(every=500, batch_size=8, metric="eval/bits", mode="min"),
    )
