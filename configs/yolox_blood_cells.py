"""A small YOLOX on microscope images of blood cells: red and white cells, and platelets.

jaxmodels train configs/yolox_blood_cells.py
"""

import os

from jaxmodels.config import COCO, AdamW, Augment, Checkpoint, Config, Cosine, Detection, Eval, Train
from jaxmodels.models.yolox import YOLOXConfig


def get_config() -> Config:
    cells = os.environ.get("BLOOD_CELLS", "../shared/data/blood_cells")
    return Config(
        model=YOLOXConfig(input_shape=(192, 256, 3), classes=3, depth=0.33, width=0.1875),
        task=Detection(objects=32),
        data=COCO(
            path=(f"{cells}/train.json",),
            eval_path=(f"{cells}/test.json",),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            batch_size=8,
        ),
        augment=Augment(flip=True, shift=16, colour=0.2),
        optim=AdamW(peak_lr=3e-3, weight_decay=0.05, warmup_steps=60, schedule=Cosine(final_lr_fraction=0.02)),
        train=Train(steps=1600, ema=0.99),
        eval=Eval(every=200, batch_size=24, metric="eval/ap", mode="max"),
        checkpoint=Checkpoint(every=100),
    )
