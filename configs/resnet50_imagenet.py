"""ResNet-50 on ImageNet, 90 epochs (Goyal et al. 2017).

    jaxmodels train configs/resnet50_imagenet.py     # imagenet2012, prepared by TFDS as array_record

Not yet run. Published with these settings: 76.3 % (top-1, one central crop).
"""

from jaxmodels.config import TFDS, Augment, Classification, Config, Cosine, Eval, Momentum, Train
from jaxmodels.models.resnet import ResNetConfig


def get_config() -> Config:
    return Config(
        model=ResNetConfig(dtype="bfloat16"),
        task=Classification(label_smoothing=0.1),
        data=TFDS(
            name="imagenet2012",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            batch_size=1024,
            threads=32,
        ),
        augment=Augment(crop=0.08, flip=True),
        optim=Momentum(
            peak_lr=0.4,
            warmup_steps=6255,
            weight_decay=1e-4,
            decay_on=("matrix",),
            clip_norm=None,
            schedule=Cosine(final_lr_fraction=0.0),
        ),
        train=Train(steps=112_600),
        eval=Eval(every=12_510, metric="eval/accuracy", mode="max"),
    )
