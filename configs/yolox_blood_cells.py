"""A small YOLOX of 1.3 million parameters on microscope images of blood cells: red and white cells, and platelets.

jaxmodels train configs/yolox_blood_cells.py --data.path DIR/train.json --data.eval-path DIR/test.json
jaxmodels predict runs/yolox_blood_cells DIR/images/BloodImage_00007.jpg
jaxmodels report runs/yolox_blood_cells

Reached AP50 0.881 and AP 0.545 on the 72 test images (0.33 and 0.17 by the color of the cells) at step 900 of 3,000, in
5 minutes on two CPU cores; the aims are 0.75 and 0.42. The other steps have not been run.
benchmarks/results/applications.md.
"""

from jaxmodels.config import COCO, AdamW, Augment, Checkpoint, Config, Cosine, Detection, Eval, Train
from jaxmodels.models.yolox import YOLOXConfig


def get_config() -> Config:
    return Config(
        model=YOLOXConfig(input_shape=(192, 256, 3), classes=3, depth=0.33, width=0.1875),
        task=Detection(objects=32),
        data=COCO(
            path=("blood_cells/train.json",),
            eval_path=("blood_cells/test.json",),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            batch_size=8,
        ),
        augment=Augment(flip=True, shift=16, colour=0.2),
        optim=AdamW(peak_lr=3e-3, weight_decay=0.05, warmup_steps=60, schedule=Cosine(final_lr_fraction=0.02)),
        train=Train(steps=3000, ema=0.99),
        eval=Eval(every=250, batch_size=24, metric="eval/ap", mode="max"),
        checkpoint=Checkpoint(every=250),
    )
