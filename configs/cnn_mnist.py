"""A small convolutional network on MNIST, with digits that are shifted and rotated.

    jaxmodels train configs/cnn_mnist.py
    jaxmodels train configs/cnn_mnist.py --data.dir DIR     # a TFDS data directory

Reached on 8,500 training and 1,500 test digits, cut from MNIST's own test set: accuracy 99.20% in 1.6 minutes, on
two CPU cores; benchmarks/results/quality.md. On a full set: not run.
"""

from jaxmodels.config import TFDS, AdamW, Augment, Classification, Config, Cosine, Eval, Train
from jaxmodels.models.cnn import CNNConfig


def get_config() -> Config:
    return Config(
        model=CNNConfig(dropout=0.3),
        task=Classification(),
        data=TFDS(name="mnist", eval_split="test", batch_size=128),
        augment=Augment(shift=2, rotate=10),
        optim=AdamW(peak_lr=2e-3, warmup_steps=100, schedule=Cosine(final_lr_fraction=0.01)),
        train=Train(steps=800, ema=0.99),
        eval=Eval(every=200, batch_size=500, metric="eval/accuracy", mode="max"),
    )
