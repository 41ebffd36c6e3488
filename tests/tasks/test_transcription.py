"""Transcription: CTC against all alignments written out, error rates, and sounds of any length in one program."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import config as configs
from jaxmodels import load_run, tasks
from jaxmodels.cli import main
from jaxmodels.config import Config, Eval, Synthetic, Table, Train, Transcription
from jaxmodels.errors import UserError
from jaxmodels.generate import speech
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.wav2vec2 import Wav2Vec2Config
from jaxmodels.tasks import ctc
from jaxmodels.tasks.transcription import errors
from tests.data.test_sounds import MODEL, RATE, TASK, tone, wav
from tests.sections import untrained
from tests.zoo import arrays


def collapsed(path, blank):
    return [k for k, _ in itertools.groupby(path) if k != blank]


def test_ctc_adds_up_every_alignment_and_finds_the_likeliest():
    rng, (T, V) = np.random.default_rng(0), (5, 3)
    blank = V - 1
    logits = 2 * rng.normal(size=(T, V))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for text in ([0], [1, 0], [0, 0], [1, 1, 0], [0, 1, 0, 1, 0]):
        paths = [p for p in itertools.product(range(V), repeat=T) if collapsed(p, blank) == text]
        chances = [sum(log_p[t, k] for t, k in enumerate(path)) for path in paths]
        padded = np.array([[*text, *[-1] * (6 - len(text))]])
        found = ctc.ctc_loss(jnp.asarray(logits[None]), jnp.array([T]), jnp.asarray(padded), blank)
        assert float(found[0]) == pytest.approx(-np.logaddexp.reduce(chances), rel=1e-5)
        at = ctc.align(log_p, np.array(text), blank)
        best = paths[int(np.argmax(chances))]
        assert [blank if i < 0 else text[i] for i in at] == list(best)


def test_the_loss_is_never_below_0_and_inf_without_enough_frames():
    sure = 60 * jax.nn.one_hot(jnp.array([[0, 2, 0, 1]]), 3)
    loss = lambda logits, frames, *text: float(ctc.ctc_loss(logits, jnp.array([frames]), jnp.array([text]), 2)[0])  # noqa: E731
    assert 0 <= loss(sure, 4, 0, 0, 1) < 1e-6
    assert loss(sure, 3, 0, 0, 1) == np.inf, "two equal characters need a blank between them"
    slope = jax.grad(lambda x: ctc.ctc_loss(x, jnp.array([4]), jnp.array([[0, 0, 1]]), 2).sum())(sure)
    assert np.isfinite(slope).all()


def test_edits_are_counted_in_characters_and_in_words():
    def ids(*texts):
        rows = [[" abcd".index(c) for c in text] for text in texts]
        return jnp.array([row + [-1] * (12 - len(row)) for row in rows])

    found, wanted = ids(" ab  cd", "abcd a", "", "b"), ids("ab cd", "ab da ", "abc a", "")
    sums = errors(found, wanted, 0)
    # a space too many; "cd a" for " da": 2 of 5; nothing of "abc a"; and a row without a text, which is left out
    assert [int(x) for x in sums["cer"]] == [1 + 2 + 5, 5 + 5 + 5]
    assert [int(x) for x in sums["wer"]] == [0 + 2 + 2, 2 + 2 + 2]
    assert "wer" not in errors(found, wanted, None)


@pytest.fixture(scope="module")
def built():
    """A small recognizer, its task and parameters, and a batch of sounds of several lengths."""
    data = Synthetic(seq_len=6, batch_size=4)
    task = tasks.build(TASK, MODEL, data)
    rng = np.random.default_rng(0)
    lengths = np.array([2000, 700, 1200, 90], np.int32)
    inputs = rng.integers(-3000, 3000, (4, 2000)).astype(np.int16) * (np.arange(2000) < lengths[:, None])
    targets = np.array([[0, 1, 2, 1, -1, -1], [3, 3, 1, 0, -1, -1], [0, 1, 2, 1, 4, 4], [2, 2, 3, 1, 0, -1]])
    batch = {"inputs": inputs.astype(np.int16), "lengths": lengths, "targets": targets}
    return task, {"model": arrays(task.networks["model"])}, jax.tree.map(jnp.asarray, batch)


def test_texts_with_too_few_frames_are_counted_and_not_learned_from(built):
    task, params, batch = built
    sums = jax.jit(task.metrics)(params, {}, batch)
    assert [int(x) for x in sums["unaligned"]] == [1, 4] and int(sums["loss"][1]) == 4 + 4 + 6
    assert int(sums["cer"][1]) == 3 + 4 + 6 + 5 and np.isfinite(float(sums["loss"][0]))
    some = jax.jit(task.metrics)(params, {}, {**batch, "weight": jnp.array([1.0, 0.0, 1.0, 0.0])})
    assert int(some["loss"][1]) == 4 + 6 and int(some["unaligned"][0]) == 0 and int(some["cer"][1]) == 3 + 6


def test_only_training_masks_and_only_about_as_much_as_it_says():
    config = Wav2Vec2Config(mask_time=0.2, mask_time_span=5, mask_bands=0.3, mask_bands_span=2)
    from jaxmodels.models.wav2vec2 import Wav2Vec2

    spans = lambda train: Wav2Vec2(config).apply(  # noqa: E731
        {}, jnp.zeros((200, 60, 40)), train, method="spans", rngs={"dropout": jax.random.key(0)}
    )
    time, bands = spans(True)
    assert (
        time.shape == (200, 60)
        and 0.15 < time.mean() < 0.22
        and bands.shape == (200, 40)
        and 0.22 < bands.mean() < 0.32
    )
    for row in np.asarray(time):
        begun = np.flatnonzero(row & ~np.append(False, row[:-1]))
        assert all(row[at : at + 5].all() for at in begun), "whole spans, or up to the end"
    assert not any(x.any() for x in spans(False))


@pytest.mark.parametrize(
    "task, model, why",
    [
        (TASK, MLPConfig(), "expected a model that reads sounds, try Wav2Vec2Config"),
        (Transcription(seconds=0.005), MODEL, "got task.seconds 0.005, expected at least 0.01"),
        (Transcription(blank=6), MODEL, "got task.blank 6, expected an id below model.vocab_size 6"),
        (Transcription(space=9), MODEL, "got task.space 9, expected an id below model.vocab_size 6"),
    ],
)
def test_what_does_not_fit_is_refused(task, model, why):
    with pytest.raises(UserError, match=why):
        tasks.build(task, model, Synthetic(seq_len=6))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run over sounds of several lengths, and their folder."""
    folder = tmp_path_factory.mktemp("sounds")
    rows = [{"audio": f"{i}.wav", "text": "ab a"[: 1 + i % 4].strip()} for i in range(12)]
    for i in range(12):
        (folder / f"{i}.wav").write_bytes(wav(tone(0.1 + 0.03 * i)))
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Table(path=(str(folder / "index.jsonl"),), files=("audio",), eval_fraction=0.3, tokenizer="chars",
                 seq_len=6, batch_size=8)  # fmt: skip
    return untrained(Config(model=MODEL, task=TASK, data=data, train=Train(steps=1), eval=Eval()), folder / "run")


def test_sounds_of_any_length_are_one_program(run):
    from jaxmodels.train.job import assemble

    job, traced = assemble(configs.read(run)[0]), []

    @jax.jit
    def loss(params, batch):
        traced.append(batch["inputs"].shape)
        return job.task.losses[0].fn(params, {}, batch, jax.random.key(0))[0]

    params, loader, lengths = {"model": arrays(job.task.networks["model"])}, job.loader("train"), set()
    for step in range(6):
        batch = loader.batch(step)
        assert np.isfinite(loss(params, batch))
        lengths |= set(np.asarray(batch["lengths"]).tolist())
    assert len(traced) == 1 and len(lengths) > 3


def test_predict_transcribes_files_and_says_which_it_cannot(run, capsys):
    folder = run.parent
    (folder / "more").mkdir()
    (folder / "more" / "long.wav").write_bytes(wav(tone(0.6)))
    (folder / "more" / "cut.wav").write_bytes(wav(tone(0.3))[:200])
    (folder / "more" / "fast.wav").write_bytes(wav(tone(0.3, rate=2 * RATE), 2 * RATE))
    assert main(["predict", str(run), str(folder / "3.wav"), str(folder / "more")]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["where"].rpartition("/")[2] for line in told] == ["3.wav", "cut.wav", "fast.wav", "long.wav"]
    assert told[0].keys() == told[2].keys() == told[3].keys() == {"where", "transcript", "confidence"}
    assert "ends after" in told[1]["error"]
    assert set(told[0]["transcript"]) <= set("ab \n\N{REPLACEMENT CHARACTER}") and 0 < told[0]["confidence"] <= 1
    assert main(["predict", str(run), str(folder / "index.txt")]) == 2


def test_a_sound_longer_than_an_example_is_read_in_parts_that_are_cut_where_it_is_quiet(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    loud = (8000 * rng.normal(size=10_000).clip(-2, 2)).astype(np.int16)
    for start in (1_500, 3_000, 4_700, 6_400, 8_000):  # gaps of a tenth of a second, one within reach of each part
        loud[start : start + RATE // 10] = 0
    parts = speech.cut(loud, 2000, RATE)
    np.testing.assert_array_equal(np.concatenate(parts), loud)
    ends = np.cumsum([len(part) for part in parts])[:-1]
    assert max(map(len, parts)) <= 2000 and len(parts) >= 5
    assert all(loud[end - 1] == loud[end] == 0 for end in ends), ends

    long = speech.listener(load_run(run))(wav(loud[:4500] / 32768, RATE))
    (tmp_path / "long.wav").write_bytes(wav(loud[:4500] / 32768, RATE))
    for i, part in enumerate(long):
        samples = part["inputs"][: part["lengths"]]
        (tmp_path / f"part{i}.wav").write_bytes(wav(samples / 32768, RATE))
    assert len(long) == 3 and main(["predict", str(run), str(tmp_path)]) == 0
    whole, *each = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert whole["where"].endswith("long.wav")
    assert whole["transcript"] == " ".join(one["transcript"] for one in each if one["transcript"])
    assert whole["confidence"] == min(one["confidence"] for one in each)


def test_an_artefact_takes_sounds_of_the_run_s_length(run):
    from jaxmodels.serve.artefact_functions import BATCH, functions

    inputs = functions(load_run(run))["predict"].inputs
    assert {name: want.shape for name, want in inputs.items()} == {"inputs": (BATCH, 2000), "lengths": (BATCH,)}
