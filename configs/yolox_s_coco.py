"""YOLOX-S on COCO; published: AP 39.6 % (Ge et al. 2021, table 3).

    jaxmodels train configs/yolox_s_coco.py --data.path DIR/annotations/instances_train2017.json \
        --data.eval-path DIR/annotations/instances_val2017.json

Not yet run. The paper trains 300 epochs, as here, with mosaic and mixup, of which there is neither here; images are
stretched to 640×640, not padded. Both files name images without a folder, so link all of them into coco/images.
"""

from jaxmodels.config import COCO, Augment, Checkpoint, Config, Cosine, Detection, Eval, Momentum, Train
from jaxmodels.models.families import preset


def get_config() -> Config:
    return Config(
        model=preset("yolox-s"),
        task=Detection(objects=120),
        data=COCO(
            path=("coco/annotations/instances_train2017.json",),
            eval_path=("coco/annotations/instances_val2017.json",),
            images="coco/images",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            batch_size=64,
            threads=16,
        ),
        augment=Augment(flip=True, shift=64, colour=0.4),
        optim=Momentum(peak_lr=0.01, weight_decay=5e-4, warmup_steps=9_000, schedule=Cosine(final_lr_fraction=0.05)),
        train=Train(steps=550_000, ema=0.9998),
        eval=Eval(every=18_000, batch_size=64, metric="eval/ap", mode="max"),
        checkpoint=Checkpoint(every=2_000),
    )
