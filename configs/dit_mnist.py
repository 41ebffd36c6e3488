"""A small DiT draws digits of a class by flow matching, with guidance.

jaxmodels train configs/dit_mnist.py
jaxmodels train configs/dit_mnist.py --data.dir DIR     # a TFDS data directory
jaxmodels sample runs/dit_mnist --prompt 3 --out threes.png
"""

from jaxmodels.config import TFDS, Augment, Config, Constant, Diffusion, Eval, Muon, Train
from jaxmodels.models.dit import DiTConfig


def get_config() -> Config:
    return Config(
        model=DiTConfig(
            input_shape=(28, 28, 1), patch=4, classes=10, layers=4, heads=3, width=96, mlp_width=384, attention="xla"
        ),
        task=Diffusion(objective="flow", guidance=1.5, sample_steps=25),
        data=TFDS(name="mnist", eval_split="test", batch_size=64),
        augment=Augment(),
        optim=Muon(peak_lr=3e-3, warmup_steps=50, schedule=Constant()),
        train=Train(steps=10_000, ema=0.995),
        eval=Eval(every=1000, batch_size=500, batches=4),
    )
