"""One sentence that sums up the abstract of a paper, written by a small BART that begins with nothing.

    jaxmodels train configs/bart_scitldr.py --data.path DIR/train.jsonl --data.eval-path DIR/validation.jsonl
    jaxmodels eval runs/bart_scitldr --data.path DIR/test.jsonl     # ROUGE, with a beam of 4

DIR is a folder of SciTLDR's abstracts, of which 1,992 to train on teach the form of such
sentences and little of what is in them: the first sentence of an abstract has a ROUGE-1 of 31.3 % on the test set. With
published weights, `--init.source BART_BASE --data.tokenizer BART_BASE` and the model of `bart_cnn_dailymail`, it is
fine-tuning as it is done in earnest.
"""

from jaxmodels.config import Config, Cosine, Eval, Muon, Seq2Seq, Table, Train
from jaxmodels.models.transformer import TransformerConfig


def get_config() -> Config:
    return Config(
        model=TransformerConfig(
            variant="bart",
            vocab_size=4000,
            context=256,
            layers=2,
            width=128,
            heads=4,
            mlp_width=384,
            activation="exact_gelu",
            norm_eps=1e-5,
            dropout=0.2,
        ),
        task=Seq2Seq(target="summary", target_len=48, label_smoothing=0.1),
        data=Table(
            path=("train.jsonl",),
            eval_path=("validation.jsonl",),
            input_field="source",
            target_field="target",
            tokenizer="bpe:4000",
            seq_len=256,
            batch_size=32,
        ),
        optim=Muon(peak_lr=3e-3, warmup_steps=50, schedule=Cosine(final_lr_fraction=0.01)),
        train=Train(steps=600),
        eval=Eval(every=150, batch_size=32),
    )
