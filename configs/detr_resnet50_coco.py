"""DETR with ResNet-50 on COCO, from its published weights; published: AP 42.0 % (Carion et al. 2020, table 1).

    jaxmodels train configs/detr_resnet50_coco.py --data.path DIR/annotations/instances_train2017.json \
        --data.eval-path DIR/annotations/instances_val2017.json --init.source DETR_RESNET_50

Not yet run. DETR_RESNET_50 is the folder of facebook/detr-resnet-50 in Hugging Face's format, whose 91 classes are
numbered with gaps: the output layer starts anew for the 80 of these files. The paper trains 500 epochs from a ResNet
alone, on images of several sizes; this is a tenth of it, on images stretched to 800×1066. The stem and the first stage
are not trained, as there. Both files name images without a folder, so link all of them into coco/images.
"""

from dataclasses import replace

from jaxmodels.config import COCO, AdamW, Augment, Checkpoint, Config, Cosine, Eval, Init, SetDetection, Train
from jaxmodels.models.families import preset


def get_config() -> Config:
    return Config(
        model=replace(preset("detr-resnet-50"), classes=80, remat="full"),
        task=SetDetection(),
        data=COCO(
            path=("coco/annotations/instances_train2017.json",),
            eval_path=("coco/annotations/instances_val2017.json",),
            images="coco/images",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            batch_size=64,
            threads=16,
        ),
        augment=Augment(flip=True),
        optim=AdamW(
            peak_lr=2e-5,
            b2=0.999,
            weight_decay=1e-4,
            warmup_steps=500,
            clip_norm=0.1,
            schedule=Cosine(final_lr_fraction=0.05),
            freeze=("backbone/stem/*", "backbone/stages/0/*"),
        ),
        train=Train(steps=92_000),
        eval=Eval(every=9_200, batch_size=64, metric="eval/ap", mode="max"),
        checkpoint=Checkpoint(every=2_000),
        init=Init(source="detr-resnet-50", fresh=("class/*",)),
    )
