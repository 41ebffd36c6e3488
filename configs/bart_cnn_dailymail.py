"""BART-large, fine-tuned to sum up news on CNN/DailyMail, as published.

    jaxmodels train configs/bart_cnn_dailymail.py --data.name DIR --init.source BART_LARGE \\
        --data.tokenizer BART_LARGE
    jaxmodels eval runs/bart_cnn_dailymail --split test     # ROUGE, with a beam of 4

Not yet run. Published: ROUGE-1 of 44.16 %, ROUGE-2 of 21.28 % on the 11,490 articles to test (Lewis et al. 2019, table
3); there a beam is also kept from repeating three words and from ending early, which is not done here. BART_LARGE is a
folder with the weights of facebook/bart-large; DIR is one of the set cnn_dailymail as the library datasets has it.
"""

import dataclasses

from jaxmodels.config import AdamW, Checkpoint, Config, Eval, HuggingFace, Init, Linear, Mesh, Seq2Seq, Train
from jaxmodels.models.families import preset


def get_config() -> Config:
    return Config(
        model=dataclasses.replace(preset("bart-large"), dtype="bfloat16"),
        task=Seq2Seq(target="summary", target_len=144, label_smoothing=0.1),
        data=HuggingFace(
            name="cnn_dailymail",
            input_field="article",
            target_field="highlights",
            tokenizer="bart-large",
            seq_len=1024,
            batch_size=64,
        ),
        optim=AdamW(peak_lr=3e-5, b2=0.999, warmup_steps=500, schedule=Linear(final_lr_fraction=0.0)),
        train=Train(steps=20_000),
        eval=Eval(every=1000, batch_size=64),
        checkpoint=Checkpoint(every=1000),
        init=Init(source="bart-large"),
        mesh=Mesh(data=1, fsdp=-1),
    )
