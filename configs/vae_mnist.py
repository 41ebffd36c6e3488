"""A variational autoencoder of digits with 20 latents; pixels are drawn as 0 or 1 anew at each step.

    jaxmodels train configs/vae_mnist.py
    jaxmodels train configs/vae_mnist.py --data.dir DIR     # a TFDS data directory

Reached on 8,500 training and 1,500 test digits, cut from MNIST's own test set: ELBO -105.06 in 1.1 minutes, on
two CPU cores; benchmarks/results/quality.md. On a full set: not run.
"""

from jaxmodels.config import TFDS, VAE, AdamW, Augment, Config, Cosine, Eval, Train
from jaxmodels.models.vae import VAEConfig


def get_config() -> Config:
    return Config(
        model=VAEConfig(hidden=(512, 256), latents=20),
        task=VAE(binarise=True, beta_warmup_steps=1000),
        data=TFDS(name="mnist", eval_split="test", batch_size=128),
        augment=Augment(shift=1, rotate=8),
        optim=AdamW(
            peak_lr=1e-3, b2=0.999, warmup_steps=200, weight_decay=0.01, schedule=Cosine(final_lr_fraction=0.02)
        ),
        train=Train(steps=5000, ema=0.998),
        eval=Eval(every=1000, batch_size=500),
    )
