"""LLaMA 3 8B on C4, with parameters sharded over all devices.

    jaxmodels data prepare configs/llama3_8b_c4.py --data tfds --data.name c4/en --data.input-field text \\
        --data.tokenizer LLAMA3_TOKENIZER_JSON --out c4
    jaxmodels train configs/llama3_8b_c4.py

Not yet run.
"""

import dataclasses

from jaxmodels.config import AdamW, Config, Eval, Mesh, Tokens, Train
from jaxmodels.models.families import preset


def get_config() -> Config:
    return Config(
        model=dataclasses.replace(preset("llama3-8b"), dtype="bfloat16", remat="full"),
        data=Tokens(path=("c4/train.bin", "c4/val.bin"), seq_len=8192, batch_size=512),
        optim=AdamW(peak_lr=3e-4, warmup_steps=2000),
        train=Train(steps=40_000),
        eval=Eval(every=1000, batches=16),
        mesh=Mesh(data=1, fsdp=-1),
    )
