"""A small LLaMA that sees a digit, hears another one, and answers a question about both.

    python -m jaxmodels train configs/multimodal_digits_fusion.py --data.path DIR    # at the root of the repository

DIR is a folder with digits_fusion, spoken_digits and raw/mnist. Both towers are trained from nothing, by the answers
alone. Reached on 1,500 pairs: 95.5 % of the answers after 1,700 steps, 34 minutes on two busy CPU cores;
benchmarks/results/applications.md. The best by the picture alone is 48.7 %, by the sound alone 49.7 %.
"""

from examples.digits_fusion import DigitsFusion
from jaxmodels.config import Augment, Config, Cosine, Eval, MultimodalLM, Muon, Train
from jaxmodels.models.multimodal import ImageTower, MultimodalConfig, SoundTower


def get_config() -> Config:
    return Config(
        model=MultimodalConfig(
            vocab_size=64,
            context=64,
            layers=2,
            heads=4,
            width=64,
            mlp_width=176,
            image=ImageTower(
                layers=3,
                kind="siglip",
                unread=False,
                input_shape=(28, 28, 1),
                patch=7,
                heads=4,
                width=64,
                mlp_width=128,
                projector="linear",
                token=62,
            ),
            sound=SoundTower(
                layers=2, sample_rate=8000, mels=40, places=66, heads=4, width=64, mlp_width=128, token=63
            ),
            unroll=3,
        ),
        task=MultimodalLM(longest=4),
        data=DigitsFusion(
            tokenizer="words:62",
            seq_len=56,
            batch_size=64,
            input_field="question",
            target_field="answer",
            mean=(0.13,),
            std=(0.31,),
        ),
        augment=Augment(shift=2, rotate=10),
        optim=Muon(peak_lr=2e-3, warmup_steps=100, schedule=Cosine(final_lr_fraction=0.01)),
        train=Train(steps=1700),
        eval=Eval(every=500, batch_size=300, metric="eval/exact_match", mode="max"),
    )
