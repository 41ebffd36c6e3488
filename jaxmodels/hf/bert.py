"""BERT, with any of its heads."""

from __future__ import annotations

from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.hf.table import Format, Settings, Weight, block, classes, classifies, labels
from jaxmodels.models.bert import BERTConfig

HEADS = {
    "BertForMaskedLM": "masked_lm",
    "BertForSequenceClassification": "classification",
    "BertForPreTraining": "pretraining",
    "BertForQuestionAnswering": "spans",
    "BertModel": "none",
}
"""Our `head` for each name in `architectures`."""


def config(s: Settings) -> BERTConfig:
    named = s.several("architectures", str, ["BertModel"])
    head = HEADS[Settings({"architectures": named[0]}, s.where, s).only("architectures", *HEADS)]
    s.only("hidden_act", "gelu")
    s.only("position_embedding_type", "absolute")
    s.only("is_decoder", False)
    s.only("add_cross_attention", False)
    s.only("tie_word_embeddings", True)
    dropout = s.number("hidden_dropout_prob", 0.1)
    s.training("attention_probs_dropout_prob", 0.1, dropout)
    s.training("classifier_dropout", dropout, dropout)
    fields = {
        "vocab_size": s.whole("vocab_size", 30522),
        "context": s.whole("max_position_embeddings", 512),
        "types": s.whole("type_vocab_size", 2),
        "layers": s.whole("num_hidden_layers", 12),
        "heads": s.whole("num_attention_heads", 12),
        "width": s.whole("hidden_size", 768),
        "mlp_width": s.whole("intermediate_size", 3072),
        "norm_eps": s.number("layer_norm_eps", 1e-12),
        "dropout": dropout,
        "classes": classes(s) if head == "classification" else None,
    }
    s.check()
    return BERTConfig(head=head, **fields)  # type: ignore[arg-type]


def describe(c: BERTConfig) -> dict[str, Any]:
    if c.pool != "first":
        raise UserError(
            f"got a BERT with pool {c.pool!r}, which transformers does not have, expected pool first, "
            "try a run that was trained with --model.pool first"
        )
    if c.head not in HEADS.values():
        raise UserError(
            f"got a BERT with head {c.head!r}, which transformers does not have, expected one of "
            f"{', '.join(HEADS.values())}, try jaxmodels predict"
        )
    (architecture,) = (name for name, head in HEADS.items() if head == c.head)
    found = {
        "architectures": [architecture],
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "type_vocab_size": c.types,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "layer_norm_eps": c.norm_eps,
        "hidden_dropout_prob": c.dropout,
        "attention_probs_dropout_prob": c.dropout,
        "tie_word_embeddings": True,
    }
    return found if c.classes is None else {**found, **labels(c.classes)}


def weights(c: BERTConfig) -> list[Weight]:
    def linear(theirs: str, ours: str) -> list[Weight]:
        return [Weight(theirs + ".weight", ours + "/w", "f d -> d f"), Weight(theirs + ".bias", ours + "/b")]

    def norm(theirs: str, ours: str) -> list[Weight]:
        return [Weight(theirs + ".weight", ours + "/scale"), Weight(theirs + ".bias", ours + "/bias")]

    embeddings, h = "bert.embeddings.", "bert.encoder.layer.{layer}."
    return [
        Weight(embeddings + "word_embeddings.weight", "embed/w"),
        Weight(embeddings + "position_embeddings.weight", "positions/w"),
        Weight(embeddings + "token_type_embeddings.weight", "types/w"),
        *norm(embeddings + "LayerNorm", "embed_norm"),
        *block(
            "layers/",
            q=h + "attention.self.query",
            k=h + "attention.self.key",
            v=h + "attention.self.value",
            o=h + "attention.output.dense",
            attn_norm=h + "attention.output.LayerNorm",
            up=h + "intermediate.dense",
            down=h + "output.dense",
            mlp_norm=h + "output.LayerNorm",
        ),
        *linear("bert.pooler.dense", "pooler"),
        *linear("cls.predictions.transform.dense", "transform"),
        *norm("cls.predictions.transform.LayerNorm", "transform_norm"),
        Weight("cls.predictions.bias", "output/b"),
        *linear("cls.seq_relationship", "next_sentence"),
        *linear("classifier", "head"),
        *linear("qa_outputs", "spans"),
    ]


def task(c: BERTConfig) -> str:
    # no task trains the first two
    trained = {"pretraining": "", "none": "", "classification": classifies(c), "spans": "question_answering"}
    return trained.get(c.head, c.head)


FORMAT = Format(
    family="bert",
    config=config,
    describe=describe,
    weights=weights,
    prefix="bert.",
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    # published files contain these heads, even where config.json names another one
    skipped=(r"^bert\.embeddings\.position_ids$", r"^bert\.pooler\.", r"^cls\.(predictions|seq_relationship)\."),
    aliases=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    task=task,
)
