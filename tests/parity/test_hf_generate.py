"""Text from an imported run is that of transformers, token by token; so is what it makes of an exported run."""

import json
from dataclasses import replace

import numpy as np
import pytest

import jaxmodels
from jaxmodels import cli, data
from jaxmodels.commands.export import export_run
from jaxmodels.commands.import_ import import_run
from jaxmodels.config import AdamW, Checkpoint, Config, Eval, Init, Metrics, Seq2Seq, Table, Text, Train
from jaxmodels.generate.translation import translated as search
from jaxmodels.models.transformer import TransformerConfig
from jaxmodels.train import load_run
from jaxmodels.train import run as runs

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
tf = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "[go]", *"abcdefghijklm"]
TEXTS = ["a b c", "d e f g", "m l k", "h"]
EAGER = {"attn_implementation": "eager"}


def tokenizer(folder, template, end="</s>", **settings):
    """A tokenizer.json of words, and what lies beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    rust = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    special = [(word, WORDS.index(word)) for word in template.split() if word in WORDS]
    rust.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    folder.mkdir(exist_ok=True)
    rust.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "pad_token": "<pad>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def fill(model, seed=3, scale=0.5):
    """Random numbers."""
    torch.manual_seed(seed)
    for name, x in model.named_parameters():
        x.data = torch.randn_like(x) * scale + float(x.ndim == 1 and name.endswith("weight"))
    return model.float().eval()


def llama(folder, **ids):
    config = tf.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **ids}, **EAGER,
    )  # fmt: skip
    fill(tf.LlamaForCausalLM(config)).save_pretrained(folder)


def t5(folder, scale=0.8, **ids):
    config = tf.T5Config(
        vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, relative_attention_num_buckets=8,
        **{"decoder_start_token_id": 4, "eos_token_id": 2, "pad_token_id": 0, **ids}, **EAGER,
    )  # fmt: skip
    fill(tf.T5ForConditionalGeneration(config), seed=4, scale=scale).save_pretrained(folder)


def theirs(folder, texts, kind, **how):
    """The tokens that transformers adds to each text, greedily, its end included."""
    made, words = kind.from_pretrained(folder, **EAGER), tf.AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        ids = torch.tensor([words(text)["input_ids"]])
        mask = torch.ones_like(ids)
        out = made.generate(ids, attention_mask=mask, do_sample=False, num_beams=1, **how)[0].tolist()
        found.append(out[1:] if made.config.is_encoder_decoder else out[ids.shape[1] :])
    return found


def text_of(ids, ends):
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return "".join(WORDS[i] for i in ids[:stop])


# ---- decoders


@pytest.mark.parametrize(
    ("ids", "generation", "ends"),
    [
        ({}, None, (2,)),
        ({}, {"eos_token_id": [7, 2]}, (7, 2)),
        ({"eos_token_id": 9}, {"max_length": 50}, ()),
        ({"eos_token_id": [11, 5]}, None, (11, 5)),
        ({}, {"eos_token_id": 2, "repetition_penalty": 1.8}, (2,)),
    ],
    ids=["config", "generation-config-list", "generation-config-without", "config-list", "repetition-penalty"],
)
def test_an_imported_llama_begins_and_stops_as_in_transformers(ids, generation, ends, tmp_path, capsys):
    tokenizer(tmp_path / "in", "<s> $A", bos_token="<s>")
    llama(tmp_path / "in", **ids)
    if generation is None:
        (tmp_path / "in" / "generation_config.json").unlink()
    else:
        (tmp_path / "in" / "generation_config.json").write_text(json.dumps(generation))
    assert cli.main(["import", str(tmp_path / "in"), "--out", str(tmp_path / "first")]) == 0
    (tmp_path / "first").rename(tmp_path / "run")  # a run is what is in its directory
    expected = theirs(tmp_path / "in", TEXTS, tf.LlamaForCausalLM, max_new_tokens=20)
    assert data.load_tokenizer(tmp_path / "run").special.ends == ends
    if ends:
        assert any(len(x) < 20 for x in expected), "none stops: nothing is tested"
    for text, wanted in zip(TEXTS, expected, strict=True):
        capsys.readouterr()
        how = ["--temperature", "0", "--tokens", "20"]
        assert cli.main(["sample", str(tmp_path / "run"), "--prompt", text, *how]) == 0
        assert capsys.readouterr().out.strip() == text.replace(" ", "") + text_of(wanted, ends)


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A", "<s> $A", "[go] <s> $A </s>"])
@pytest.mark.parametrize("length", [None, 5])
def test_a_text_that_is_cut_keeps_what_stands_around_it_as_in_transformers(template, length, tmp_path):
    tokenizer(tmp_path, template)
    ours, texts = data.load_tokenizer(tmp_path), ["a b c d e f g", "a"]
    expected = tf.AutoTokenizer.from_pretrained(tmp_path)(texts, truncation=length is not None, max_length=length)
    assert [x.tolist() for x in ours.encode_many(texts, special=True, length=length)] == expected["input_ids"]


def test_a_llama_that_was_trained_on_goes_out_with_its_ids_template_and_generation_config(tmp_path, capsys):
    source = tmp_path / "in"
    tokenizer(source, "<s> $A", bos_token="<s>", chat_template="{{ messages }}")
    llama(source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "bos_token_id": 1, "top_k": 9}))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "text.txt").write_text("a b c d e f g\n" * 40)
    model, _ = jaxmodels.load_pretrained(source)
    cfg = Config(
        model=model.config,
        data=Text(path=(str(tmp_path / "text.txt"),), tokenizer=str(source), seq_len=8),
        train=Train(steps=2),
        eval=Eval(batches=1),
        checkpoint=Checkpoint(every=0),
        metrics=Metrics(progress="none", loggers=()),
        init=Init(source=str(source)),
    )
    runs.train(cfg, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in source.iterdir()}
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (1, 2, 0)
    expected = theirs(tmp_path / "out", TEXTS, tf.LlamaForCausalLM, max_new_tokens=12)
    opened = load_run(tmp_path / "run")
    from jaxmodels.generate.texts import continued

    for text, wanted in zip(TEXTS, expected, strict=True):
        ours = continued(opened.model, opened.params["model"], opened.tokenizer, text, 12, temperature=0)
        assert ours == text.replace(" ", "") + text_of(wanted, (2, 7))


# ---- encoder-decoders


def pairs(folder):
    rows = [{"en": " ".join(text), "de": " ".join(reversed(text))} for text in ("abc", "dab", "cab", "bad", "ad", "db")]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    return rows, Table(path=(str(path),), input_field="en", target_field="de", seq_len=8, batch_size=16)


def translated(run, texts):
    from jaxmodels.generate import translate_texts

    opened = load_run(run)
    return translate_texts(opened.model, opened.params["model"], opened.tokenizer, texts, beams=1)


def test_an_imported_t5_translates_as_in_transformers_and_learns_behind_its_start_token(tmp_path):
    tokenizer(tmp_path / "in", "$A </s>")
    t5(tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").unlink()
    import_run(tmp_path / "in", out=tmp_path / "run")
    expected = theirs(tmp_path / "in", TEXTS, tf.T5ForConditionalGeneration, max_new_tokens=15)
    assert any(2 in x for x in expected) and len({tuple(x) for x in expected}) > 1
    for ours, wanted in zip(translated(tmp_path / "run", TEXTS), expected, strict=True):
        assert ours == text_of(wanted, (2,))  # of at most 16 tokens, the last of which is made the end
    _, section = pairs(tmp_path)
    section = replace(section, tokenizer=str(tmp_path / "run"))
    model = jaxmodels.config.read(tmp_path / "run")[0].model
    source = data.open_for(Config(model=model, task=Seq2Seq(), data=section), "train")
    batch = source.batch(np.arange(4), np.zeros(4, int))
    assert (batch["tokens"][:, 0] == 4).all()
    for row in range(4):
        real = batch["target_segment_ids"][row] > 0
        np.testing.assert_array_equal(batch["tokens"][row][real][1:], batch["targets"][row][real][:-1])
        assert batch["targets"][row][real][-1] == 2


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A T5 as transformers saves it, and sources."""
    folder = tmp_path_factory.mktemp("searched")
    tokenizer(folder, "$A </s>")
    t5(folder, scale=0.5)
    rng = np.random.default_rng(0)
    return folder, [" ".join(rng.choice(list("abcdefghijklm"), n)) for n in np.full(12, 5)]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"length_penalty": -1.0},
        {"early_stopping": True},
        {"early_stopping": "never", "length_penalty": 0.5},
        {"eos_token_id": 12, "early_stopping": True, "length_penalty": -1.5},
    ],
    ids=str,
)
def test_an_imported_t5_searches_as_transformers_does(asked, searched, tmp_path):
    folder, texts = searched
    said = {"decoder_start_token_id": 4, "pad_token_id": 0, "eos_token_id": [2, 8, 12], "num_beams": 3, **asked}
    (folder / "generation_config.json").write_text(json.dumps(said))
    import_run(folder, out=tmp_path / "run")
    made, words = tf.T5ForConditionalGeneration.from_pretrained(folder, **EAGER), tf.AutoTokenizer
    words, wanted, ends = words.from_pretrained(folder), [], np.atleast_1d(said["eos_token_id"]).tolist()
    for text in texts:
        ids = torch.tensor([words(text)["input_ids"]])
        wanted.append(made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=15)[0, 1:].tolist())
    ours = search(load_run(tmp_path / "run"), texts, max_ratio=16, most=16)
    ended = [i for i, ids in enumerate(wanted) if len(ids) < 15]
    assert ended
    assert [ours[i] for i in ended] == [text_of(wanted[i], ends) for i in ended]


def test_a_t5_of_several_ends_stops_at_any_of_them_as_in_transformers(tmp_path):
    tokenizer(tmp_path / "in", "$A </s>")
    t5(tmp_path / "in")
    alone = theirs(tmp_path / "in", TEXTS, tf.T5ForConditionalGeneration, max_new_tokens=15)
    other = alone[0][1]
    said = {"decoder_start_token_id": 4, "pad_token_id": 0, "eos_token_id": [2, other]}
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps(said))
    import_run(tmp_path / "in", out=tmp_path / "run")
    assert load_run(tmp_path / "run").tokenizer.special.ends == (2, other)
    wanted = theirs(tmp_path / "in", TEXTS, tf.T5ForConditionalGeneration, max_new_tokens=15)
    assert wanted[0] == alone[0][:2] and wanted[0][-1] == other
    assert [text.replace(" ", "") for text in translated(tmp_path / "run", TEXTS)] == [
        text_of(ids, (2, other)) for ids in wanted
    ]
    export_run(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [2, other]


def test_a_translator_that_was_trained_here_translates_alike_in_transformers(tmp_path):
    rows, section = pairs(tmp_path)
    cfg = Config(
        model=TransformerConfig(
            variant="t5", norm="pre", vocab_size=40, layers=1, heads=2, width=16, mlp_width=32, dropout=0.0,
            relative_buckets=8, relative_distance=16,
        ),
        task=Seq2Seq(),
        data=replace(section, tokenizer="words:40"),
        optim=AdamW(peak_lr=2e-2),
        train=Train(steps=60),
        eval=Eval(batches=1),
        checkpoint=Checkpoint(every=0),
        metrics=Metrics(progress="none", loggers=()),
    )  # fmt: skip
    runs.train(cfg, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    texts = [row["en"] for row in rows]
    ours = translated(tmp_path / "run", texts)
    assert len(set(ours)) > 2
    words = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    end = data.load_tokenizer(tmp_path / "run").end
    own = data.load_tokenizer(tmp_path / "run")
    for text in texts:  # as training had it
        assert words(text)["input_ids"] == [*own.encode(text).tolist(), end]
    found = theirs(tmp_path / "out", texts, tf.T5ForConditionalGeneration, max_new_tokens=16)
    assert all(end in x for x in found)
    assert [own.decode(x[: x.index(end)]) for x in found] == ours
