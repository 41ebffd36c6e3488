"""DCGAN on MNIST.

    jaxmodels train configs/gan_mnist.py
    jaxmodels train configs/gan_mnist.py --data.dir DIR     # a TFDS data directory

Reached (the aim is ≥ 8.00) on 8,500 training and 1,500 test digits, cut from MNIST's own test set: a score by
`cnn_mnist` of 6.69 in 17.8 minutes, on two CPU cores that were busy with other work too;
benchmarks/results/quality.md. On a full set: not run.
"""

from jaxmodels.config import AugmentConfig, Config, DataConfig, EvalConfig, OptimConfig, TaskConfig, TrainConfig
from jaxmodels.models.gan import GANConfig


def get_config() -> Config:
    return Config(
        model=GANConfig(channels=(32, 64)),
        task=TaskConfig(name="gan"),
        data=DataConfig(source="tfds", name="mnist", eval_split="test", batch_size=32),
        augment=AugmentConfig(),
        optim=OptimConfig(name="adam", peak_lr=3e-4, b1=0.5, b2=0.999, schedule="linear", clip_norm=None),
        train=TrainConfig(steps=12_000, ema=0.999),
        eval=EvalConfig(every=3000, batch_size=500),
    )
