"""WGAN with gradient penalty on MNIST: five updates of the critic for each one of the generator.

    jaxmodels train configs/wgan_mnist.py
    jaxmodels train configs/wgan_mnist.py --data.dir DIR     # a TFDS data directory

Reached (the aim is ≥ 8.00) on 8,500 training and 1,500 test digits, cut from MNIST's own test set: a score by
`cnn_mnist` of 4.83 in 25.7 minutes, on two CPU cores that were busy with other work too: 2,000 updates of the generator
are few. benchmarks/results/quality.md. On a full set: not run.
"""

from jaxmodels.config import AugmentConfig, Config, DataConfig, EvalConfig, OptimConfig, TaskConfig, TrainConfig
from jaxmodels.models.gan import GANConfig


def get_config() -> Config:
    return Config(
        model=GANConfig(kind="wgan-gp", latents=128, channels=(32, 64)),
        task=TaskConfig(name="gan", critic_steps=5),
        data=DataConfig(source="tfds", name="mnist", eval_split="test", batch_size=80),
        augment=AugmentConfig(),
        optim=OptimConfig(name="adam", peak_lr=3e-4, b1=0.0, b2=0.9, schedule="linear", clip_norm=None),
        train=TrainConfig(steps=2000, ema=0.998),
        eval=EvalConfig(every=400, batch_size=500),
    )
