"""A small ResNet on MNIST: three stages of one basic block.

    jaxmodels train configs/resnet_mnist.py
    jaxmodels train configs/resnet_mnist.py --data.dir DIR     # a TFDS data directory

Reached on 8,500 training and 1,500 test digits, cut from MNIST's own test set: accuracy 99.40% in 1.9 minutes, on
two CPU cores that did nothing else; benchmarks/results/quality.md. On a full set: not run.
"""

from jaxmodels.config import TFDS, AdamW, Augment, Classification, Config, Cosine, Eval, Train
from jaxmodels.models.resnet import ResNetConfig


def get_config() -> Config:
    return Config(
        model=ResNetConfig(
            input_shape=(28, 28, 1),
            classes=10,
            depths=(1, 1, 1),
            widths=(16, 32, 64),
            bottleneck=False,
            stem="small",
            stem_width=16,
        ),
        task=Classification(label_smoothing=0.1),
        data=TFDS(name="mnist", eval_split="test", batch_size=128),
        augment=Augment(shift=2, rotate=10),
        optim=AdamW(peak_lr=4e-3, warmup_steps=100, schedule=Cosine(final_lr_fraction=0.01)),
        train=Train(steps=660),
        eval=Eval(every=220, batch_size=500, metric="eval/accuracy", mode="max"),
    )
