"""Questions about media: rows of tokens, what is learned of them, and replies of a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxmodels
from jaxmodels import load_run, tasks
from jaxmodels.cli import main
from jaxmodels.config import Config, Eval, MultimodalLM, Stdlib, Synthetic, Table, Train
from jaxmodels.data import open_source
from jaxmodels.data.replies import Layout
from jaxmodels.data.tokenizer import Bytes
from jaxmodels.data.waves import wav
from jaxmodels.errors import UserError
from jaxmodels.generate.replies import asker
from jaxmodels.models.multimodal import ImageTower, MultimodalConfig, SoundTower, merged
from jaxmodels.report import replies
from jaxmodels.tasks.multimodal_lm import exactly, media
from tests.sections import untrained
from tests.zoo import arrays

BODY = {"heads": 2, "width": 16, "mlp_width": 24}
IMAGE = ImageTower(1, "siglip", False, (8, 8, 1), 4, **BODY, projector="linear", token=300)
SOUND = SoundTower(1, sample_rate=2000, mels=8, places=12, **BODY, token=301)
MODEL = MultimodalConfig(vocab_size=302, layers=1, **BODY, image=IMAGE, sound=SOUND)
TASK = MultimodalLM(template="{question}: {image}{sound}\n", longest=6)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Six good rows, one whose sound is too long, and one whose answer is."""
    folder, rows = tmp_path_factory.mktemp("media"), []
    for i in range(8):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.wav").write_bytes(wav(np.sin(np.arange(200 + 40 * i if i != 6 else 600)), 2000))
        answer = "much too long" if i == 7 else f"no {i}"
        rows.append({"image": f"{i}.png", "sound": f"{i}.wav", "question": f"what {i}", "answer": answer})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_of(table, **fields):
    more = {"input_field": "question", "target_field": "answer", "tokenizer": "bytes", **fields}
    return Table(
        path=(str(table),), eval_path=(str(table),), files=("image", "sound"), seq_len=40, batch_size=8, **more
    )


def opened(table, split="eval", task=TASK, **fields):
    data = data_of(table, **fields)
    return open_source(data, split, task, vocab_size=302, fields=tasks.build(task, MODEL, data).fields)


def test_a_row_has_the_places_of_its_media_and_only_the_answer_is_a_target(table, monkeypatch):
    monkeypatch.setattr(Bytes, "end", 10, raising=False)
    found = opened(table).batch(np.arange(8), np.zeros(8, int))
    for i in range(6):
        heard = SOUND.taken(200 + 40 * i)
        before = [*f"what {i}: ".encode(), *[300] * 4, *[301] * heard, 10]
        whole = [*before, *f"no {i}".encode(), 10]
        assert (
            found["tokens"][i, : len(whole) - 1].tolist() == whole[:-1] and not found["tokens"][i, len(whole) :].any()
        )
        targets = [*[-1] * (len(before) - 1), *whole[len(before) :]]
        assert found["targets"][i].tolist() == [*targets, *[-1] * (40 - len(targets))]
        assert found["lengths"][i] == 200 + 40 * i and (found["images"][i] == 20 * i).all()
    assert (found["targets"][6:] == -1).all(), "what stands for a bad record does not count"


def test_a_template_without_a_medium_and_a_text_with_its_token_are_refused(table):
    fields = tasks.build(TASK, MODEL, data_of(table)).fields
    with pytest.raises(UserError, match="got task.template '{question}{image}', expected {question} and image and so"):
        Layout.of(fields, Bytes(), "{question}{image}")
    taken = MultimodalConfig(
        vocab_size=302, layers=1, **BODY, image=IMAGE, sound=SoundTower(1, 2000, 8, 12, token=97, **BODY)
    )
    layout = Layout.of(tasks.build(TASK, taken, data_of(table)).fields, Bytes(), "")
    with pytest.raises(UserError, match=r"has token 97 in 'what ', which model\.sound\.token keeps for the sound"):
        layout.prompt("what", {"image": 4, "sound": 3})


def test_answers_are_right_where_each_of_their_tokens_is_the_likeliest():
    features = jax.nn.one_hot(jnp.array([[0, 1, 2, 3], [0, 1, 2, 2], [3, 3, 3, 3]]), 4)
    targets = jnp.array([[-1, 1, 2, -1], [-1, -1, 2, 3], [-1, -1, -1, -1]])
    right, count = exactly(features, jnp.eye(4), targets, 3)
    assert (int(right), int(count)) == (1, 2)


def test_a_place_without_a_feature_is_nan_and_padding_of_a_sound_changes_nothing():
    model = jaxmodels.create(MODEL)
    params, rng = arrays(model), np.random.default_rng(0)
    images = rng.random((2, 8, 8, 1), np.float32)
    sounds = rng.random((2, SOUND.samples), np.float32)
    ids = np.array([[5, 300, 300, 300, 300, 301, 301, 9], [300, 300, 300, 300, 300, 301, 301, 9]], np.int32)
    apply = jax.jit(model.apply)
    logits = np.asarray(apply(params, ids, images, (sounds, np.array([220, 220]))))
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1]).all()
    # behind the frames that see the last samples of the sound
    loud = sounds.copy()
    loud[:, 300:] = 0.5
    np.testing.assert_allclose(apply(params, ids, images, (loud, np.array([220, 220])))[0], logits[0], atol=1e-5)
    other = np.asarray(apply(params, ids, images[::-1], (sounds, np.array([220, 220]))))
    assert np.abs(other[0, 1:] - logits[0, 1:]).max() > 1e-3
    with pytest.raises(UserError, match="got 1 media, expected image and sound, in this order, or none"):
        model.apply(params, ids, images)


def test_squares_of_patches_are_merged_row_by_row():
    x = np.arange(24).reshape(1, 24, 1)
    found = merged(jnp.asarray(x), (4, 6), 2)
    assert found[0, 0].tolist() == [0, 1, 6, 7] and found[0, 1].tolist() == [2, 3, 8, 9]
    assert found[0, 3].tolist() == [12, 13, 18, 19]


def test_a_run_replies_with_what_its_model_finds_likeliest(table, tmp_path, capsys):
    words = data_of(table, tokenizer="words:290")
    cfg = Config(model=MODEL, task=TASK, data=words, train=Train(steps=1), eval=Eval(every=0))
    run = load_run(untrained(cfg, tmp_path / "run"))
    assert main(["predict", str(run.directory), str(table), "--tokens", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("question") for row in rows[:2]] == ["what 0", "what 1"] and "lasts 0.30 s" in rows[6]["error"]
    # the first token, from the whole row at once
    batch = run.evaluation().examples(0, 1)
    first = int((batch["targets"][0] >= 0).argmax())
    logits = run.model.apply(run.params["model"], batch["tokens"], *media(batch, cfg.data))
    assert rows[0]["reply"].startswith(run.tokenizer.decode([int(logits[0, first].argmax())]).strip())
    imported = dataclasses.replace(run, config=dataclasses.replace(run.config, data=Synthetic()))
    with pytest.raises(UserError, match="does not say how images are normalized"):
        asker(imported, 3)
    (picture,) = replies.pieces(run.evaluation())
    titles = [axis.get_title(loc="left").splitlines() for axis in picture.figure.axes[::2]]
    assert titles[0][0].startswith("what 0") and titles[0][1].endswith("not no 0") and titles[0][2].endswith("% image")


def test_other_models_and_models_without_towers_are_refused(table):
    with pytest.raises(UserError, match="got task multimodal_lm with GPT2Config"):
        tasks.build(TASK, jaxmodels.create("gpt2").config, Stdlib())
    with pytest.raises(UserError, match="got a model without a tower"):
        MultimodalConfig(image=ImageTower(layers=0))
    with pytest.raises(UserError, match=r"got model\.image\.token 302, expected an id below model\.vocab_size 302"):
        MultimodalConfig(vocab_size=302, layers=1, **BODY, image=ImageTower(1, token=302))
