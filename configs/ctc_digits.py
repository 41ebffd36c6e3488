"""A small Transformer over log-mel frames that reads strings of spoken digits, by CTC.

    python -m jaxmodels train configs/ctc_digits.py --data.path DIR     # spoken_digits; at the root of the repository

Reached on 300 strings of 2 to 7 digits, of recordings that were not trained on: word error rate 3.8 % after 871 steps,
14 minutes on two busy CPU cores; benchmarks/results/applications.md. Whisper tiny.en, zero-shot, has 19.4 %.
"""

from examples.connected_digits import ConnectedDigits
from jaxmodels.config import AdamW, Config, Cosine, Eval, Train, Transcription
from jaxmodels.models.wav2vec2 import Wav2Vec2Config


def get_config() -> Config:
    return Config(
        model=Wav2Vec2Config(
            vocab_size=18,
            sample_rate=8000,
            mels=48,
            conv_widths=(64, 96),
            conv_windows=(3, 3),
            conv_strides=(2, 2),
            conv_norm="layer",
            conv_bias=True,
            layers=3,
            heads=4,
            width=96,
            mlp_width=256,
            norm="pre",
            position_window=15,
            position_groups=4,
            dropout=0.0,
            mask_time=0.05,
            mask_time_span=8,
            mask_bands=0.15,
            mask_bands_span=6,
            unroll=3,
        ),
        task=Transcription(seconds=6.2),
        data=ConnectedDigits(tokenizer="chars", seq_len=48, batch_size=16, group_field="speaker"),
        optim=AdamW(peak_lr=2e-3, warmup_steps=100, weight_decay=0.01, schedule=Cosine(final_lr_fraction=0.02)),
        train=Train(steps=1500),
        eval=Eval(every=500, batch_size=100, metric="eval/wer", mode="min"),
    )
