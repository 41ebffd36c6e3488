"""A small VGG with batch normalization on MNIST.

    jaxmodels train configs/vgg_mnist.py
    jaxmodels train configs/vgg_mnist.py --data.dir DIR     # a TFDS data directory

Reached on 8,500 training and 1,500 test digits, cut from MNIST's own test set: accuracy 99.67% in 1.3 minutes, on
two CPU cores; benchmarks/results/quality.md. On a full set: not run.
"""

from jaxmodels.config import TFDS, AdamW, Augment, Classification, Config, Cosine, Eval, Train
from jaxmodels.models.vgg import VGGConfig


def get_config() -> Config:
    return Config(
        model=VGGConfig(
            input_shape=(28, 28, 1),
            classes=10,
            depths=(2, 2, 2),
            widths=(16, 32, 64),
            hidden=(128,),
            batch_norm=True,
            dropout=0.3,
        ),
        task=Classification(label_smoothing=0.1),
        data=TFDS(name="mnist", eval_split="test", batch_size=128),
        augment=Augment(shift=2, rotate=10),
        optim=AdamW(peak_lr=3e-3, warmup_steps=100, schedule=Cosine(final_lr_fraction=0.01)),
        train=Train(steps=660),
        eval=Eval(every=220, batch_size=500, metric="eval/accuracy", mode="max"),
    )
