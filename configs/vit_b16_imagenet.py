"""ViT-B/16 on ImageNet alone, 300 epochs, with the augmentation of Steiner et al. 2021.

    jaxmodels train configs/vit_b16_imagenet.py     # imagenet2012, prepared by TFDS as array_record

Not yet run.
"""

from jaxmodels.config import TFDS, AdamW, Augment, Classification, Config, Cosine, Eval, Train
from jaxmodels.models.vit import ViTConfig


def get_config() -> Config:
    return Config(
        model=ViTConfig(pool="mean", stochastic_depth=0.1, dtype="bfloat16"),
        task=Classification(mixup=0.2),
        data=TFDS(name="imagenet2012", mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=1024, threads=32),
        augment=Augment(crop=0.05, flip=True, randaugment=2, magnitude=10),
        optim=AdamW(
            peak_lr=1e-3, b2=0.999, warmup_steps=10_000, weight_decay=0.1, schedule=Cosine(final_lr_fraction=0.0)
        ),
        train=Train(steps=375_000),
        eval=Eval(every=12_510, metric="eval/accuracy", mode="max"),
    )
