"""A small SegFormer on the photographs, the augmentation and the schedule of `unet_pets`.

    jaxmodels train configs/segformer_pets.py --data.path DIR/pets/index.jsonl
    jaxmodels eval runs/segformer_pets

Its first patches are 2 pixels apart instead of 4, so that it sees as many tokens of 64×64 pixels as B0 of 128×128. Its
aim is a mIoU of 0.50; it has been built and its step compiled, but no figure of it was read.
"""

import dataclasses

import unet_pets

from jaxmodels.config import AdamW, Config, Cosine
from jaxmodels.models.segformer import SegFormerConfig


def get_config() -> Config:
    return dataclasses.replace(
        unet_pets.get_config(),
        model=SegFormerConfig(
            input_shape=(64, 64, 3),
            classes=3,
            widths=(24, 48, 96, 128),
            heads=(1, 2, 4, 4),
            strides=(2, 2, 2, 2),
            windows=(5, 3, 3, 3),
            decoder_width=96,
            stochastic_depth=0.0,
        ),
        optim=AdamW(peak_lr=1.5e-3, weight_decay=0.05, warmup_steps=50, schedule=Cosine(final_lr_fraction=0.01)),
    )
