"""Pictures of a run: of a class by name or number, of a text, of anything, and onto one sheet."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmodels import cli, tasks
from jaxmodels.config import Config
from jaxmodels.data.vocabulary import words
from jaxmodels.errors import UserError
from jaxmodels.generate.pictures import draw, sheet
from jaxmodels.models.dit import DiTConfig
from jaxmodels.train.saved import Kept, Run, write_kept
from tests.sections import data_of, task_of
from tests.zoo import ZOO, arrays

SIZES = {"input_shape": (4, 4, 3), "patch": 2, "layers": 1, "heads": 2, "width": 8, "mlp_width": 8}
MODELS = {
    "class": ("diffusion", DiTConfig(classes=3, **SIZES)),
    "text": ("diffusion", DiTConfig(classes=0, vocab_size=9, **SIZES)),
    "nothing": ("diffusion", DiTConfig(classes=0, **SIZES)),
    "vae": ZOO["vae"],
    "vit": ZOO["vit"],
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Runs that were never trained, in which each parameter matters."""
    found = {}
    for name, (kind, model) in MODELS.items():
        guidance = 1.0 if name == "nothing" else 2.0
        task = task_of(kind, **({"sample_steps": 2, "guidance": guidance} if kind == "diffusion" else {}))
        cfg = Config(model=model, task=task, data=data_of("synthetic", seq_len=6))
        folder = tmp_path_factory.mktemp(name)
        write_kept(folder, Kept(classes=("cat", "dog", "cow")))
        if name == "text":
            (folder / "tokenizer.json").write_text(words(["red blue heart circle"], 9).to_str())
        built = tasks.build(cfg.task, model, cfg.data)
        params = {network: arrays(each) for network, each in built.networks.items()}
        found[name] = Run(folder, cfg, built.networks, params, {}, 1)
    return found


def test_a_class_is_drawn_by_its_name_or_number(run_of):
    run = run_of["class"]
    found = draw(run, "cow", 3, 5)
    np.testing.assert_array_equal(draw(run, "2", 3, 5), found)
    given = {"labels": jnp.array([2, 2, 2])}
    np.testing.assert_array_equal(run.task.samples(run.params, {}, 3, 5, given=given), found)
    assert not np.array_equal(draw(run, "cat", 3, 5), found)


def test_a_text_is_drawn_by_its_words(run_of):
    run = run_of["text"]
    red, blue, turned = (draw(run, text, 2, 5) for text in ("red heart", "blue heart", "heart red"))
    assert np.abs(red - blue).max() > 1e-3
    np.testing.assert_allclose(turned, red, atol=1e-6)
    assert np.abs(draw(run, None, 2, 5) - red).max() > 1e-3


def test_a_run_of_any_task_that_makes_images_draws(run_of):
    assert draw(run_of["vae"], count=3).shape == (3, 8, 8, 1)
    assert draw(run_of["nothing"], count=3).shape == (3, 4, 4, 3)


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("class", "dogs", "got prompt 'dogs', expected one of the classes cat, dog, cow, did you mean 'dog'"),
        ("class", "3", "got prompt '3', expected one of the classes cat, dog, cow"),
        ("nothing", "cat", "whose model is not told what to draw, expected none, try it without"),
        ("vae", "cat", "got a prompt 'cat' for a run of task vae"),
        ("vit", None, "got a run of task classification, expected one whose model generates images"),
        ("text", "red " * 9, "got captions of up to .* tokens, expected at most data.seq_len 6"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run_of, name, prompt, message):
    with pytest.raises(UserError, match=message):
        draw(run_of[name], prompt)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_laid_out_in_rows_and_enlarged(channels):
    images = np.random.default_rng(0).random((5, 4, 6, channels), np.float32)
    found = np.asarray(sheet(images)).reshape(2 * 4 * 28, 3 * 6 * 28, -1)[::28, ::28]
    pixels = np.round(255 * images)
    np.testing.assert_array_equal(found[4:, 6:12], pixels[4])
    np.testing.assert_array_equal(found[:4, 12:], pixels[2])
    assert (found[4:, 12:] == 255).all()


def test_the_command_writes_a_png_and_refuses_what_has_no_effect(run_of, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxmodels.train.load_run", lambda run, best=False: run_of[run])
    monkeypatch.setattr("jaxmodels.config.read", lambda run: (run_of[run].config, {}))
    assert cli.main(["sample", "class", "--prompt", "dog", "--count", "4", "--guidance", "3", "--steps", "3"]) == 0
    run = run_of["class"]
    assert capsys.readouterr().out == f"{run.directory / 'sample.png'}: 4 pictures of 4×4 of dog\n"
    task = dataclasses.replace(run.config.task, guidance=3.0, sample_steps=3)
    expected = draw(dataclasses.replace(run, config=dataclasses.replace(run.config, task=task)), "dog", 4)
    np.testing.assert_array_equal(np.asarray(Image.open(run.directory / "sample.png")), np.asarray(sheet(expected)))
    for argv, message in (
        (["vae", "--guidance", "2"], "got --guidance for a run of vae, whose pictures need none, try it without"),
        (["vae", "--top-k", "2"], "got --top-k for a run of vae, expected it for one of texts, try it without"),
        (["vae", "--seconds", "2"], "got --seconds for a run of vae, expected it for one of sounds, try it without"),
        (["vit", "--count", "2"], "got --count for a run of classification, expected it for one of pictures"),
        (["class", "--out", "a.jpg"], "got --out a.jpg, expected a name for a PNG, try --out a.png"),
        (["class", "--out", "nowhere/a.png"], "got --out nowhere/a.png, whose folder does not exist"),
    ):
        assert cli.main(["sample", *argv]) == 2
        assert message in capsys.readouterr().err
