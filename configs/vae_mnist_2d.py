"""The variational autoencoder of `vae_mnist` with two latents, for a grid of everything it can generate.

    jaxmodels train configs/vae_mnist_2d.py --data.dir DIR     # a TFDS data directory
    jaxmodels report runs/vae_mnist_2d

Reached on 8,500 training and 1,500 test digits, cut from MNIST's own test set: ELBO -154.90 in 1.3 minutes, on two
CPU cores that were busy with other work too; benchmarks/results/quality.md. On a full set: not run.
"""

import dataclasses

from vae_mnist import get_config as of_20

from jaxmodels.config import Config


def get_config() -> Config:
    cfg = of_20()
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, latents=2),
        train=dataclasses.replace(cfg.train, steps=3000),
    )
