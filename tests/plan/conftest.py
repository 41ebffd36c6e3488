"""Steps compiled for hardware that is not here, each once in a module."""

import importlib.util

import pytest

from jaxmodels.plan import compile, figures, topology

COMPILERS = {"h100": "jax_cuda12_plugin", **dict.fromkeys(("v5e", "v5p", "v6e", "v7"), "libtpu")}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Steps, each compiled once."""
    cache = tmp_path_factory.mktemp("plans")

    def make(on, cfg):
        package = COMPILERS[on.split(":")[0]]
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the compiler {package}: pip install 'jaxmodels[aot]'")
        return compile.compiled(cfg, topology.parse(on), cache)

    return make


@pytest.fixture(scope="module")
def planned(compiled):
    """Plans of steps, each compiled once."""
    return lambda on, cfg: figures.figures(cfg, compiled(on, cfg))
