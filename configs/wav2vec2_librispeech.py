"""wav2vec 2.0 base fine-tuned on the 960 hours of LibriSpeech, by CTC.

    jaxmodels train configs/wav2vec2_librispeech.py --init.source WAV2VEC2_BASE --init.fresh 'head/*'

Not yet run. The tables have a line for each recording: {"audio": "1272-128104-0000.flac", "text": "MISTER QUILTER"};
WAV2VEC2_BASE is a directory with the published weights, pre-trained without texts.
"""

from jaxmodels.config import WSD, AdamW, Config, Eval, Table, Train, Transcription
from jaxmodels.models.wav2vec2 import Wav2Vec2Config


def get_config() -> Config:
    return Config(
        model=Wav2Vec2Config(vocab_size=32, mask_bands=0.05, mask_bands_span=64, dtype="bfloat16", remat="dots"),
        task=Transcription(seconds=25.0),
        data=Table(
            path=("librispeech/train_960.jsonl",),
            eval_path=("librispeech/dev_clean.jsonl",),
            files=("audio",),
            target_field="text",
            tokenizer="chars",
            seq_len=600,
            batch_size=128,
            threads=16,
        ),
        optim=AdamW(peak_lr=1e-4, b2=0.98, warmup_steps=8000, schedule=WSD()),
        train=Train(steps=80_000),
        eval=Eval(every=4000, metric="eval/wer", mode="min"),
    )
