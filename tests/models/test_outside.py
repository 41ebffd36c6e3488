"""A model family and a kernel of attention from outside the tree: found by import, in this process and in another."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models.families import FAMILIES, family, family_of
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.kernels import kernel

FAMILY = '''
from dataclasses import dataclass
import flax.linen as nn
from jaxmodels.fields import Dim
from jaxmodels.models import layers
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import register
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.model import Family


@dataclass(frozen=True)
class LinearConfig(ModelConfig):
    """One linear layer."""

    input_shape: tuple[Dim, ...] = (2, 2, 1)
    """Shape of an example."""
    classes: Dim = 3
    """Outputs."""


class Linear(nn.Module):
    config: LinearConfig

    @nn.compact
    def __call__(self, x, *, train=False, head=True):
        c = self.config
        x = x.reshape(len(x), -1)
        return layers.Linear((c.classes,), ("features", "classes"), name="head")(x) if head else x


presets = {"outside-wide": LinearConfig(classes=9)}
register(Family("outside-linear", LinearConfig, Linear, image_inputs, presets))
'''
KERNEL = """
from jaxmodels.models.kernels import xla
from jaxmodels.models.kernels.kernel import Kernel

calls = []


def attend(q, k, v, **how):
    calls.append(q.shape)
    return xla.attend(q, k, v, **how)


def refuses(call):
    return f"needs at most 8 tokens, got {call.T}" if call.T > 8 else None


mine = Kernel(attend, frozenset({"causal", "scale", "float32"}), refuses=refuses)
not_one = attend
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package beside the tree, on the path of this process."""
    folder = tmp_path / "outside_package"
    folder.mkdir()
    for name, text in {"__init__": "", "models": FAMILY, "kernels": KERNEL}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("outside_package")]:
        del sys.modules[name]
    FAMILIES._registered.pop("outside-linear", None)


ADDRESS = "outside_package.models:LinearConfig"


def test_a_family_does_not_take_the_name_of_another(package):
    (package / "outside_package" / "taken.py").write_text(FAMILY.replace("outside-linear", "gpt2"))
    with pytest.raises(UserError, match="got a second model family 'gpt2', expected a name that is free"):
        jaxmodels.create("outside_package.taken:LinearConfig")
    assert family("gpt2").config is GPT2Config


@pytest.mark.parametrize(
    ("said", "instead", "message"),
    [
        (
            "Linear, image_inputs",
            "lambda config: None, image_inputs",
            "whose network gives None, expected a Linen module",
        ),
        ("image_inputs, presets", "lambda *_: None, presets", "whose inputs gives None, expected a tuple of jax.Shape"),
        (
            "image_inputs, presets",
            "3, presets",
            "got 3 as a part of model family 'outside-linear', expected a function",
        ),
        ("LinearConfig(classes=9)", "9", "got 9 as preset 'outside-wide' of model family .*, expected a LinearConfig"),
        ('"outside-linear", LinearConfig', '"outside-linear", 3', "got 3 for model family .*, expected a ModelConfig"),
        (
            '("features", "classes")',
            '("featurs", "classes")',
            "parameter head/w of shape .*, but got logical axis 'feat",
        ),
        ('("features", "classes")', '("embed", "embed")', r"parameter head/w of shape \(4, 3\) .*, both are on 'fsdp'"),
        ("x, *, train=False, head=True", "x, head=True", "whose network takes .*, expected the keyword train too"),
        (
            "input_shape: tuple[Dim, ...]",
            "input_shape: list[int]",
            "whose field input_shape is list\\[int\\], expected",
        ),
    ],
)
def test_a_family_that_does_not_give_what_it_should_is_refused_in_one_line(package, said, instead, message):
    assert said in FAMILY
    (package / "outside_package" / "models.py").write_text(FAMILY.replace(said, instead))
    with pytest.raises(UserError, match=message):
        jaxmodels.create(ADDRESS).axes()


def test_a_config_without_a_family_says_how_to_register_one(package):
    (package / "outside_package" / "models.py").write_text(FAMILY.rpartition("register(")[0])
    config = importlib.import_module("outside_package.models").LinearConfig()
    with pytest.raises(
        UserError, match=r"got model config LinearConfig.*, try register\(Family\(…, config=LinearConfig"
    ):
        family_of(config)


def test_a_preset_does_not_take_the_name_of_another(package):
    (package / "outside_package" / "models.py").write_text(FAMILY.replace("outside-wide", "gpt2-medium"))
    assert jaxmodels.create(ADDRESS).config.classes == 3
    with pytest.raises(UserError, match="got preset 'gpt2-medium' twice, the second time of model family 'outside-lin"):
        jaxmodels.create("gpt2-medium")
    assert jaxmodels.create("gpt2").config.layers == 12


def test_a_family_is_created_by_its_address_and_then_by_its_names(package):
    model = jaxmodels.create(ADDRESS, classes=4)
    x = jnp.ones((2, 2, 2, 1))
    assert model.apply(model.init(jax.random.key(0)), x).shape == (2, 4)
    assert model.axes()["head"]["w"] == ("features", "classes") and model.axes()["head"]["w"].kind == "matrix"
    assert FAMILIES.name_of(type(model.config)) == ADDRESS
    assert family(ADDRESS) is family("outside-linear") is family_of(model.config)
    assert jaxmodels.create("outside-wide").config.classes == 9
    assert "outside-wide" in jaxmodels.list_models()["outside-linear"]


def test_another_process_finds_the_family_by_its_address_alone(package):
    code = f"import jaxmodels; print(jaxmodels.create({ADDRESS!r}).count())"
    env = {"PYTHONPATH": f"{package}:{':'.join(sys.path)}", "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "15", done.stderr[-2000:]


def test_a_kernel_computes_the_attention_of_a_model_that_names_it(package):
    config = GPT2Config(layers=1, width=16, heads=2, vocab_size=31, context=8, attention="outside_package.kernels:mine")
    model = jaxmodels.create(config)
    params = model.init(jax.random.key(0))
    tokens = jnp.arange(8)[None]
    from outside_package import kernels  # pyright: ignore[reportMissingImports]

    kernels.calls.clear()
    got = model.apply(params, tokens)
    assert set(kernels.calls) == {(1, 8, 2, 8)}
    np.testing.assert_array_equal(got, jaxmodels.create(config, attention="xla").apply(params, tokens))


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        (
            "outside_package.kernels:mine",
            {"T": 9},
            "kernel 'outside_package.kernels:mine' needs at most 8 tokens, got 9",
        ),
        ("outside_package.kernels:mine", {"window": 2}, "does not support window; kernels that do: xla, blockwise"),
        (
            "outside_package.kernels:not_one",
            {},
            "which is a function, expected a jaxmodels.models.kernels.kernel.Kernel",
        ),
        ("outside_package.kernels:other", {}, "expected a name of outside_package.kernels"),
    ],
)
def test_what_a_kernel_cannot_compute_is_refused_in_one_line(package, name, how, message):
    from jaxmodels.models.attention import attention

    q = jnp.ones((1, how.pop("T", 8), 2, 8))
    with pytest.raises(UserError) as error:
        attention(q, q, q, causal=True, kernel=name, **how)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("splach", "got model.attention 'splach', expected one of auto, xla, .* did you mean 'splash'"),
        (
            "nowhere.kernels:mine",
            "got attention kernel nowhere.kernels:mine, whose module nowhere.kernels is not there",
        ),
        (3, "got model.attention 3, expected text"),
    ],
)
def test_a_config_refuses_a_kernel_that_is_not_there(name, message):
    with pytest.raises(UserError, match=message):
        GPT2Config(attention=name)


def test_a_feature_that_no_call_asks_for_is_refused():
    with pytest.raises(
        UserError, match="got kernel feature 'casual', expected some of causal, .* did you mean 'causal'"
    ):
        kernel.Kernel(lambda q, k, v, **how: q, frozenset({"casual"}))
