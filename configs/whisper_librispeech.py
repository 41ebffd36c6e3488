"""Whisper small fine-tuned on the 960 hours of LibriSpeech.

    jaxmodels train configs/whisper_librispeech.py

Not yet run. The tables have a line for each recording: {"audio": "1272-128104-0000.flac", "text": "MISTER QUILTER"};
`whisper-small` is a directory with the published weights and their tokenizer, whose tokens for English, transcription
and no timestamps precede each text. `jaxmodels eval` measures the word error rate.
"""

import dataclasses

from jaxmodels.config import AdamW, Config, Eval, Init, Seq2Seq, Table, Train
from jaxmodels.models.whisper import small


def get_config() -> Config:
    return Config(
        model=dataclasses.replace(small, dropout=0.1, dtype="bfloat16", remat="dots"),
        task=Seq2Seq(seconds=30.0),
        data=Table(
            path=("librispeech/train_960.jsonl",),
            eval_path=("librispeech/dev_clean.jsonl",),
            files=("audio",),
            target_field="text",
            tokenizer="whisper-small",
            seq_len=256,
            batch_size=128,
            threads=16,
        ),
        init=Init(source="whisper-small"),
        optim=AdamW(peak_lr=1e-5, b2=0.98, warmup_steps=500),
        train=Train(steps=20_000),
        eval=Eval(every=1000),
    )
