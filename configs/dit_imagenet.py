"""DiT-B/4 draws images of ImageNet at 64×64 pixels by flow matching, of a class, with guidance.

    jaxmodels train configs/dit_imagenet.py     # imagenet2012, prepared by TFDS as array_record

Not yet run.
"""

import dataclasses

from jaxmodels.config import TFDS, AdamW, Augment, Config, Constant, Diffusion, Eval, Train
from jaxmodels.models.dit import sizes


def get_config() -> Config:
    return Config(
        model=dataclasses.replace(sizes["b"], input_shape=(64, 64, 3), patch=4, dtype="bfloat16"),
        task=Diffusion(objective="flow", guidance=1.5),
        data=TFDS(name="imagenet2012", batch_size=256, threads=32),
        augment=Augment(flip=True),
        # Peebles & Xie 2022, section 4: a constant rate, and averages of the parameters
        optim=AdamW(peak_lr=1e-4, b2=0.999, warmup_steps=1000, weight_decay=0.0, schedule=Constant()),
        train=Train(steps=400_000, ema=0.9999),
        eval=Eval(every=10_000, batches=40),
    )
