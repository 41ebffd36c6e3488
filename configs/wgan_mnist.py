"""WGAN with gradient penalty on MNIST: five critic updates per generator update.

    jaxmodels train configs/wgan_mnist.py
    jaxmodels train configs/wgan_mnist.py --data.dir DIR     # a TFDS data directory

Reached (the aim is ≥ 8.00) on 8,500 training and 1,500 test digits, cut from MNIST's own test set: a score by
`cnn_mnist` of 8.11 in 7.5 minutes, on two CPU cores that did little else; without the hidden layer 4.83.
benchmarks/results/quality.md. On a full set: not run.
"""

from jaxmodels.config import GAN, TFDS, Adam, Augment, Config, Eval, Linear, Train
from jaxmodels.models.gan import GANConfig


def get_config() -> Config:
    return Config(
        model=GANConfig(kind="wgan-gp", latents=128, channels=(16, 32), hidden=256),
        task=GAN(critic_steps=5),
        data=TFDS(name="mnist", eval_split="test", batch_size=160),
        augment=Augment(),
        optim=Adam(peak_lr=1e-3, b1=0.0, b2=0.9, clip_norm=None, schedule=Linear()),
        train=Train(steps=2000, ema=0.995),
        eval=Eval(every=200, batch_size=500),
    )
