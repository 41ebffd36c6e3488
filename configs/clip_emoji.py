"""CLIP, small, that names emoji in a style that it has never seen.

    jaxmodels train configs/clip_emoji.py --data.path DIR/index.jsonl     # image, text, split; pictures beside it
    jaxmodels predict runs/clip_emoji DIR/fluent

To reach: the right one of 1,473 names for 50 % of the test style's pictures, where the name of the picture that is
nearest in its pixels is right for 35.4 %. Not reached: 13.8 % after 1,000 steps, of which each took a second on a busy
machine; benchmarks/results/applications.md.
"""

from jaxmodels.config import Augment, Config, Contrastive, Cosine, Eval, Muon, Table, Train
from jaxmodels.models.clip import CLIPConfig


def get_config() -> Config:
    return Config(
        model=CLIPConfig(
            input_shape=(32, 32, 3),
            patch=8,
            image_layers=3,
            image_width=128,
            image_heads=4,
            image_mlp_width=256,
            vocab_size=2048,
            context=16,
            end_token=0,
            text_layers=1,
            text_width=64,
            text_heads=2,
            text_mlp_width=128,
            embedding=96,
        ),
        task=Contrastive(),
        data=Table(
            path=("index.jsonl",),
            files=("image",),
            input_field="image",
            label_field="text",
            captions=("{label}",),
            tokenizer="words:2048",
            seq_len=16,
            split_field="split",
            eval_split="test",
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            batch_size=128,
        ),
        augment=Augment(crop=0.7, shift=2, rotate=15, colour=0.4),
        optim=Muon(peak_lr=2e-3, warmup_steps=50, schedule=Cosine(final_lr_fraction=0.01)),
        train=Train(steps=1500),
        eval=Eval(every=500, batch_size=128, metric="eval/image_to_text", mode="max"),
    )
