"""A small Vision Transformer on MNIST.

    jaxmodels train configs/vit_mnist.py
    jaxmodels train configs/vit_mnist.py --data.dir DIR     # a TFDS data directory

Reached on 8,500 training and 1,500 test digits, cut from MNIST's own test set: accuracy 98.47% in 5.4 minutes, on
two CPU cores that did little else; benchmarks/results/quality.md. On a full set: not run.
"""

from jaxmodels.config import TFDS, Augment, Classification, Config, Cosine, Eval, Muon, Train
from jaxmodels.models.vit import ViTConfig


def get_config() -> Config:
    return Config(
        model=ViTConfig(
            input_shape=(28, 28, 1),
            patch=4,
            classes=10,
            layers=4,
            heads=4,
            width=64,
            mlp_width=128,
            pool="mean",
            unroll=4,
        ),
        task=Classification(label_smoothing=0.1),
        data=TFDS(name="mnist", eval_split="test", batch_size=128, mean=(0.13,), std=(0.31,)),
        augment=Augment(shift=2, rotate=10),
        optim=Muon(peak_lr=3e-3, warmup_steps=100, schedule=Cosine(final_lr_fraction=0.01)),
        train=Train(steps=1200),
        eval=Eval(every=300, batch_size=500, metric="eval/accuracy", mode="max"),
    )
