"""GPT-2 (124M) on OpenWebText, with nanoGPT's settings.

    jaxmodels data prepare configs/gpt2_openwebtext.py --data huggingface --data.name Skylion007/openwebtext \\
        --data.train-split 'train[:99%]' --data.eval-split 'train[99%:]' --data.tokenizer GPT2_TOKENIZER_JSON \\
        --out openwebtext
    jaxmodels train configs/gpt2_openwebtext.py

Not yet run. nanoGPT reports a loss of 2.85 after 600,000 steps on 8 A100s (about four days).
"""

from jaxmodels.config import AdamW, Config, Eval, Mesh, Tokens, Train
from jaxmodels.models.gpt2 import GPT2Config


def get_config() -> Config:
    return Config(
        model=GPT2Config(vocab_size=50304, dropout=0.0, dtype="bfloat16"),
        data=Tokens(path=("openwebtext/train.bin", "openwebtext/val.bin"), seq_len=1024, batch_size=480),
        optim=AdamW(peak_lr=6e-4, warmup_steps=2000),
        train=Train(steps=600_000),
        eval=Eval(every=2000, batches=40),
        mesh=Mesh(data=-1),
    )
