"""A small DiT draws emoji from their names by flow matching, also those whose name it has never seen.

jaxmodels train configs/dit_emoji.py --data.path DIR/index.jsonl     # image, text, held_out_name; pictures beside it
jaxmodels sample runs/dit_emoji --prompt "red heart" --guidance 3

No pictures of it were looked at yet: only its data were opened.
"""

from jaxmodels.config import Augment, Config, Constant, Diffusion, Eval, Muon, Table, Train
from jaxmodels.models.dit import DiTConfig


def get_config() -> Config:
    return Config(
        model=DiTConfig(
            input_shape=(32, 32, 3),
            patch=4,
            classes=0,
            vocab_size=2048,
            layers=6,
            heads=4,
            width=128,
            mlp_width=512,
            attention="xla",
        ),
        task=Diffusion(objective="flow", guidance=3.0, sample_steps=25),
        data=Table(
            path=("index.jsonl",),
            files=("image",),
            label_field="text",
            captions=("{label}",),
            tokenizer="words:2048",
            seq_len=16,
            split_field="held_out_name",
            train_split="0",
            eval_split="1",
            batch_size=64,
        ),
        augment=Augment(shift=1),
        optim=Muon(peak_lr=3e-3, warmup_steps=50, schedule=Constant()),
        train=Train(steps=6000, ema=0.995),
        eval=Eval(every=500, batch_size=64),
    )
