"""DCGAN on MNIST, with a fully connected layer in each network.

    jaxmodels train configs/gan_mnist.py
    jaxmodels train configs/gan_mnist.py --data.dir DIR     # a TFDS data directory

Reached (the aim is ≥ 8.00) on 8,500 training and 1,500 test digits, cut from MNIST's own test set: a score by
`cnn_mnist` of 8.29 in 1.6 minutes, on two CPU cores that did little else; benchmarks/results/quality.md. Without the
hidden layer, and with wider convolutions, 6.69: parts of digits looked right, but whole digits did not. On a full set:
not run.
"""

from jaxmodels.config import GAN, TFDS, Adam, Augment, Config, Eval, Linear, Train
from jaxmodels.models.gan import GANConfig


def get_config() -> Config:
    return Config(
        model=GANConfig(channels=(16, 32), hidden=256),
        task=GAN(),
        data=TFDS(name="mnist", eval_split="test", batch_size=64),
        augment=Augment(),
        optim=Adam(peak_lr=5e-4, b1=0.5, b2=0.999, clip_norm=None, schedule=Linear()),
        train=Train(steps=4000, ema=0.998),
        eval=Eval(every=500, batch_size=500),
    )
