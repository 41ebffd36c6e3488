"""BART writes what transformers writes of the same weights, and is trained on the same tokens."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels import data
from jaxmodels.commands.export import export_run
from jaxmodels.commands.import_ import import_run
from jaxmodels.config import AdamW, Checkpoint, Config, Eval, Init, Metrics, Seq2Seq, Synthetic, Train
from jaxmodels.errors import UserError
from jaxmodels.generate import decode
from jaxmodels.models.families import family
from jaxmodels.train import load_run
from jaxmodels.train import run as runs
from tests.parity.test_hf_generate import EAGER, TEXTS, WORDS, fill, pairs, text_of, tokenizer, translated

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
tf = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2}
SIZE = {
    "max_position_embeddings": 24, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
FORCED = {"forced_bos_token_id": 1, "forced_eos_token_id": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BART with the tokenizer and the generation_config.json of a published one."""
    folder = tmp_path_factory.mktemp("bart") / "in"
    tokenizer(folder, "<s> $A </s>", bos_token="<s>")
    config = tf.BartConfig(vocab_size=len(WORDS), **SIZE, **IDS, forced_eos_token_id=2, **EAGER)
    fill(tf.BartForConditionalGeneration(config), seed=7, scale=0.3).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({**IDS, **FORCED}))
    return folder


@pytest.fixture(scope="module")
def both(folder):
    theirs = tf.BartForConditionalGeneration.from_pretrained(folder, **EAGER)
    return theirs, *jaxmodels.load_pretrained(folder)


@pytest.fixture(scope="module")
def run(folder):
    import_run(folder, out=folder.parent / "run")
    return folder.parent / "run"


@pytest.mark.parametrize("name", [name for name in family("transformer").presets if name.startswith("bart")])
def test_published_barts_have_transformers_number_of_parameters(name):
    c = family("transformer").presets[name]
    sizes = {"encoder_layers": c.layers, "decoder_layers": c.layers, "d_model": c.width}
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), c.heads)
    hidden = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), c.mlp_width)
    with torch.device("meta"):
        theirs = tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=c.vocab_size, **sizes, **heads, **hidden))
    assert jaxmodels.create(c).count() == sum(x.numel() for x in theirs.parameters())


def test_the_published_sizes_are_those_of_the_paper_s_files():
    counts = {name: jaxmodels.create(name).count() for name in ("bart-base", "bart-large", "bart-large-cnn")}
    assert counts == {"bart-base": 139_420_416, "bart-large": 406_291_456, "bart-large-cnn": 406_290_432}


@pytest.mark.parametrize("beams", [1, 4])
def test_what_is_found_behind_the_forced_tokens_is_what_transformers_generates(both, beams):
    theirs, model, params = both
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(4, len(WORDS), (5, 9)).astype(np.int32), np.ones((5, 9), np.int32)
    mask[1, 6:], mask[3, 4:] = 0, 0
    how = {"num_beams": beams, "max_length": 16, "do_sample": False, **FORCED}
    if beams > 1:
        how |= {"length_penalty": 0.0, "early_stopping": False}
    given = {name: torch.from_numpy(x).long() for name, x in (("input_ids", ids), ("attention_mask", mask))}
    wanted = theirs.generate(**given, **how).numpy()
    assert (wanted[:, :2] == [2, 1]).all() and len({tuple(x) for x in wanted.tolist()}) > 2
    # of 16 tokens two are given
    found = decode(model, params, ids, segment_ids=mask, start=(2, 1), end=2, limit=14, beams=beams, alpha=0).tokens
    for ours, row in zip(found, wanted[:, 2:].tolist(), strict=True):
        stop = row.index(2)
        assert ours[: stop + 1].tolist() == row[: stop + 1]


def test_an_imported_bart_writes_as_in_transformers(folder, run):
    theirs, words = tf.BartForConditionalGeneration.from_pretrained(folder, **EAGER), load_run(run).tokenizer.special
    assert (words.start, words.before, words.ends) == ((2, 1), (1,), (2,))
    for ours, text in zip(translated(run, TEXTS), TEXTS, strict=True):
        ids = torch.tensor([tf.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), num_beams=1, max_length=18)[0].tolist()
        assert ours == text_of(wanted[2:], (2,))


def test_a_batch_has_transformers_tokens_and_their_loss(both, run, tmp_path):
    theirs, model, params = both
    rows, section = pairs(tmp_path)
    cfg = Config(model=model.config, task=Seq2Seq(target_len=7), data=replace(section, tokenizer=str(run)))
    batch = data.open_for(cfg, "train").batch(np.arange(4), np.zeros(4, int))
    texts, words = [row["en"] for row in rows], tf.AutoTokenizer.from_pretrained(run)
    real = batch["segment_ids"] > 0
    assert batch["inputs"].shape == (4, 8) and batch["tokens"].shape == batch["targets"].shape == (4, 7)
    assert all(list(x[keep]) in words(texts)["input_ids"] for x, keep in zip(batch["inputs"], real, strict=True))
    labels = torch.from_numpy(np.where(batch["targets"] < 0, -100, batch["targets"])).long()
    given = {"input_ids": torch.from_numpy(batch["inputs"]).long(), "attention_mask": torch.from_numpy(real).long()}
    with torch.no_grad():
        out = theirs(**given, labels=labels)
    shifted = theirs.prepare_decoder_input_ids_from_labels(labels).numpy()
    counts = batch["targets"] >= 0
    np.testing.assert_array_equal(np.where(counts, batch["tokens"], 0), np.where(counts, shifted, 0))
    task = jaxmodels.tasks.build(cfg.task, model.config, cfg.data)
    sums = jax.jit(task.metrics)({"model": params}, {}, {name: x for name, x in batch.items()})
    total, count = sums["loss"]
    np.testing.assert_allclose(total / count, out.loss, rtol=0, atol=1e-4)


def test_a_fine_tuned_bart_goes_out_as_it_came_in_and_writes_alike(folder, run, tmp_path):
    rows, section = pairs(tmp_path)
    cfg = Config(
        model=load_run(run).model.config,
        task=Seq2Seq(),
        data=replace(section, tokenizer=str(folder)),
        optim=AdamW(peak_lr=3e-3),
        train=Train(steps=3),
        eval=Eval(batches=1),
        checkpoint=Checkpoint(every=0),
        metrics=Metrics(progress="none", loggers=()),
        init=Init(source=str(folder)),
    )
    runs.train(cfg, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (
        folder / "generation_config.json"
    ).read_bytes()
    theirs = tf.BartForConditionalGeneration.from_pretrained(tmp_path / "out", **EAGER)
    before = tf.BartForConditionalGeneration.from_pretrained(folder, **EAGER)
    assert not torch.equal(theirs.model.shared.weight, before.model.shared.weight)
    texts = [row["en"] for row in rows]
    for ours, text in zip(translated(tmp_path / "run", texts), texts, strict=True):
        ids = torch.tensor([tf.AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"]])
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), num_beams=1, max_length=18)[0].tolist()
        assert ours == text_of(wanted[2:], (2,))


def test_a_bias_of_the_logits_that_is_not_zero_is_refused(both, tmp_path):
    theirs = both[0]
    try:
        theirs.final_logits_bias[0, 3] = 0.5
        theirs.save_pretrained(tmp_path)
    finally:
        theirs.final_logits_bias[0, 3] = 0.0
    with pytest.raises(UserError, match="not zero, and not computed here: final_logits_bias"):
        jaxmodels.load_pretrained(tmp_path)


def test_texts_longer_than_the_context_are_refused_before_anything_is_computed(both):
    _, model, params = both
    with pytest.raises(UserError, match="got targets of up to 25 tokens, expected at most the model's context of 24"):
        decode(model, params, [[5]], start=(2, 1), end=2, limit=24)
    with pytest.raises(UserError, match=r"expected at most model\.context 24, try --model\.context 48"):
        jaxmodels.tasks.build(Seq2Seq(target_len=48), model.config, Synthetic(seq_len=8))
