"""What a config.json says counts, and what it leaves out is taken as transformers takes it: each setting in turn."""

import json

import pytest

from jaxmodels import hf
from jaxmodels.errors import UserError
from jaxmodels.hf.table import Settings

pytestmark = pytest.mark.parity
tf = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

SIZES = {"hidden_size": 48, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 4}
DECODER = {**SIZES, "vocab_size": 97, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 10}
IMAGE = {**SIZES, "image_size": 20, "patch_size": 5, "num_channels": 1, "layer_norm_eps": 1e-3}
TEXT = {**SIZES, "vocab_size": 97, "max_position_embeddings": 17, "layer_norm_eps": 1e-3}
SLIDES = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
UNLIKE = {
    "gpt2": tf.GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=3, n_positions=17, n_inner=30, embd_pdrop=0.3),
    "llama": tf.LlamaConfig(**DECODER, rms_norm_eps=1e-3, tie_word_embeddings=True),
    "mistral": tf.MistralConfig(**DECODER, sliding_window=4),
    "qwen2": tf.Qwen2Config(**{**DECODER, "head_dim": None}, **SLIDES),
    "qwen3": tf.Qwen3Config(**DECODER, **SLIDES),
    "mixtral": tf.MixtralConfig(**DECODER, num_local_experts=3, num_experts_per_tok=1, sliding_window=4),
    "t5": tf.T5Config(vocab_size=97, d_model=20, d_kv=7, d_ff=29, num_layers=2, num_decoder_layers=3, num_heads=3,
                      relative_attention_num_buckets=6, relative_attention_max_distance=9, dropout_rate=0.3,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    "bart": tf.BartConfig(vocab_size=97, max_position_embeddings=17, d_model=20, encoder_layers=2, decoder_layers=3,
                          encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=29, decoder_ffn_dim=29,
                          dropout=0.3),
    "bert": tf.BertConfig(**TEXT, type_vocab_size=3, hidden_dropout_prob=0.3, num_labels=5,
                          architectures=["BertForSequenceClassification"]),
    "vit": tf.ViTConfig(**IMAGE, hidden_dropout_prob=0.3, num_labels=5),
    "resnet": tf.ResNetConfig(embedding_size=9, hidden_sizes=[9, 14, 9, 9], depths=[1, 2, 1, 1], num_channels=1,
                              layer_type="basic", num_labels=4),
    "clip": tf.CLIPConfig(text_config={**TEXT, "eos_token_id": 1}, vision_config=IMAGE, projection_dim=14),
}  # fmt: skip
"""Configs few settings of which are the defaults."""
WORDS = ("architectures", "model_type")  # what says which model it is
WITHOUT_EFFECT = {
    "where it came from": ("_name_or_path", "dtype"),
    "the form of a result of transformers": (
        "return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "use_cache",
    ),
    "how transformers cuts or rounds a product that is the same": (
        "chunk_size_feed_forward", "pretraining_tp", "reorder_and_upcast_attn",
    ),
    "only weights that are not in the file": (
        "initializer_range", "initializer_factor", "logit_scale_init_value", "init_std",
    ),
    "read where tokens are made or drawn": (
        "bos_token_id", "eos_token_id", "pad_token_id", "bart.decoder_start_token_id", "bart.forced_eos_token_id",
    ),
    "read with the names of the classes": ("problem_type", "id2label", "label2id"),
    "a part that a model with these weights has not": (
        "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
        "pooler_act", "pooler_output_size", "encoder_stride", "out_features", "out_indices", "stage_names",
        "t5.classifier_dropout", "bart.classifier_dropout", "text_config.projection_dim",
        "vision_config.projection_dim",
    ),
    "what the family is in any case": ("is_encoder_decoder", "t5.is_decoder", "bart.is_decoder"),
    "layer_types beside it counts": ("max_window_layers",),
    "the file has another embedding or not": ("t5.tie_word_embeddings",),
}  # fmt: skip
"""Settings that decide nothing of what is computed, by the reason; those that do so in one place alone with it."""


def converted(values):
    """Our config, or what is wrong with theirs."""
    try:
        return hf.format_of(hf.family_of(values["model_type"]), values["model_type"]).config(
            Settings(values, "config.json")
        )
    except UserError as error:
        return str(error)


def theirs(kind, values):
    """The settings as transformers completes them."""
    given = {name: value for name, value in values.items() if name not in WORDS}
    return {**json.loads(json.dumps(type(UNLIKE[kind])(**given).to_dict())), "architectures": values["architectures"]}


def places(values):
    """Every setting, those of a tower too, as the path to it."""
    for name, value in values.items():
        if name in WORDS or name == "transformers_version":
            continue
        yield (name,)
        if name in ("text_config", "vision_config"):
            yield from ((name, inner) for inner in value if inner != "model_type")


def copied(values, place):
    """A copy of the settings, and what is around a place in it."""
    inside = copy = json.loads(json.dumps(values))
    for name in place[:-1]:
        inside = inside[name]
    return copy, inside


def without(values, place):
    copy, inside = copied(values, place)
    del inside[place[-1]]
    return copy


def others(value):
    """Values that a setting does not have."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value // 2] if value > 1 else [value + 1]
    if isinstance(value, float):
        return [2 * value + 0.125]
    if isinstance(value, list):
        return [[*others(value[0])[:1], *value[1:]], []]
    if isinstance(value, dict):
        return [{**value, name: other} for name, inner in value.items() for other in others(inner)]
    return ["another"] if isinstance(value, str) else [True, 3, "another"]


def told(values):
    """Our config with the remarks on theirs, or what is wrong with theirs."""
    settings = Settings(values, "config.json")
    try:
        return hf.format_of(hf.family_of(values["model_type"]), values["model_type"]).config(settings), settings.remarks
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_setting_that_is_left_out_is_that_of_transformers(kind, monkeypatch):
    read, get = set(), Settings.get
    monkeypatch.setattr(Settings, "get", lambda s, name, *default: (read.add(name), get(s, name, *default))[1])
    values = json.loads(json.dumps(UNLIKE[kind].to_dict()))
    values["architectures"] = values["architectures"] or ["X"]
    if kind == "bert":
        assert values["architectures"] == ["BertForSequenceClassification"]
    config = converted(values)
    assert not isinstance(config, str), config
    assert config == converted(theirs(kind, values))
    tried = 0
    for place in [place for place in places(values) if place[-1] in read]:
        less = without(values, place)
        try:
            complete = theirs(kind, less)
        except Exception:  # transformers refuses it, such as heads that do not divide the default width
            continue
        assert converted(less) == converted(complete), place
        tried += 1
    assert tried >= 6


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_setting_that_is_changed_is_computed_or_refused_or_has_no_effect(kind):
    values = json.loads(json.dumps(UNLIKE[kind].to_dict()))
    values["architectures"] = values["architectures"] or ["X"]
    before, listed = told(values), {name for names in WITHOUT_EFFECT.values() for name in names}
    ignored = set()
    for place in places(values):
        if place[-1] in (*WORDS, "text_config", "vision_config"):  # what is inside has a place of its own
            continue
        names = {place[-1], ".".join(place), f"{kind}.{place[-1]}"}
        for other in others(copied(values, place)[1][place[-1]]):
            changed, inside = copied(values, place)
            inside[place[-1]] = other
            if told(changed) == before:
                assert names & listed, (place, other)
                ignored |= names & listed
    assert {"dtype", "return_dict"} < ignored


def test_the_towers_of_the_first_clip_files_are_read_as_transformers_reads_them():
    values = json.loads(json.dumps(UNLIKE["clip"].to_dict()))
    old = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2}
    values |= {"text_config_dict": old, "architectures": ["CLIPModel"]}
    values["vision_config"]["layer_norm_eps"] = 1e-5
    config = converted(values)
    assert (config.text_layers, config.text_width, config.vocab_size) == (2, 24, 49408)
    assert config == converted(theirs("clip", values))
