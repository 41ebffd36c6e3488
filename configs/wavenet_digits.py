"""WaveNet on spoken digits, told which digit and which speaker.

jaxmodels train configs/wavenet_digits.py --data.path index.jsonl     # sounds, labels, speakers, splits
jaxmodels sample runs/wavenet_digits --prompt "7, george" --out seven.wav
"""

from jaxmodels.config import AdamW, Config, Cosine, Eval, Table, Train, Waveform
from jaxmodels.models.wavenet import WaveNetConfig


def get_config() -> Config:
    return Config(
        model=WaveNetConfig(conditions=(10, 6), width=48, skip=96),
        task=Waveform(conditions=("label", "group")),
        data=Table(
            files=("file",), split_field="split", eval_split="test", group_field="speaker", seq_len=4096, batch_size=4
        ),
        optim=AdamW(peak_lr=3e-3, b2=0.99, warmup_steps=100, weight_decay=0.0, schedule=Cosine(final_lr_fraction=0.02)),
        train=Train(steps=6000, ema=0.995),
        eval=Eval(every=1000, batch_size=8, metric="eval/bits", mode="min"),
    )
