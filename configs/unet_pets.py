"""A small U-Net that tells pets from their background and the border between, on photographs of 64×64.

    jaxmodels train configs/unet_pets.py --data.path DIR/pets/index.jsonl
    jaxmodels eval runs/unet_pets
    jaxmodels predict runs/unet_pets PHOTO... --out masks

Reached a mIoU of 0.649 on 140 photographs that were held out (pet 0.711, background 0.837, border 0.398), in 14 minutes
on two CPU cores. The aim is 0.60; the most frequent class of each pixel has 0.360. benchmarks/results/applications.md.
"""

from jaxmodels.config import AdamW, Augment, Config, Cosine, Eval, Segmentation, Table, Train
from jaxmodels.models.unet import UNetConfig


def get_config() -> Config:
    return Config(
        model=UNetConfig(input_shape=(64, 64, 3), classes=3, widths=(12, 24, 48, 96, 192)),
        task=Segmentation(),
        data=Table(
            path=("pets/index.jsonl",),
            files=("image",),
            masks=("mask",),
            class_names=("pet", "background", "border"),
            split_field="split",
            eval_split="test",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            batch_size=16,
        ),
        augment=Augment(crop=0.5, flip=True, rotate=10, colour=0.3),
        optim=AdamW(peak_lr=2e-3, weight_decay=0.05, warmup_steps=50, schedule=Cosine(final_lr_fraction=0.01)),
        train=Train(steps=3000),
        eval=Eval(every=500, batch_size=72, metric="eval/miou", mode="max"),
    )
