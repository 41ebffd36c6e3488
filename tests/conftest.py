"""Eight virtual CPU devices, a persistent compilation cache, and where the real data sets lie."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.quick import FLAGS

ROOT = Path(__file__).resolve().parent.parent
# modules that take longest, which begin first, so that the workers end together; the two that start a SLURM lie apart
LONG = (
    "plan/test_compile.py", "launch/test_slurm.py", "parallel/test_processes.py", "models/test_zoo.py",
    "parallel/test_zoo_steps.py",
    "launch/test_bits.py", "docs/test_blocks.py", "train/test_run.py", "parallel/test_pipeline.py", "test_fuzz.py",
    "models/test_mixtral.py", "parallel/test_accumulate.py", "parallel/test_context.py", "train/test_elastic.py",
    "train/test_offload.py", "parallel/test_equivalence.py", "plan/test_search.py",
)  # fmt: skip
# the tests' own programs, whatever hardware is here; must be set before jax is imported
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {FLAGS}"
).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# threads of XLA's CPU client: with fewer than collectives under way, devices wait for each other for good
os.environ.setdefault("PJRT_NPROC", "32")

import pytest

from jaxmodels.registry import Registry


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = tuple(line for line in (ROOT / "tests" / "slow.txt").read_text().splitlines() if line[:1] not in ("", "#"))
    for item in items:
        if item.nodeid.startswith(slow):
            item.add_marker(pytest.mark.slow)
    order = {ROOT / "tests" / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    # what has been imported stays: the collector need not look at it each time, as jax's traces make it do
    gc.collect()
    gc.freeze()


def forget_names() -> Iterator[None]:
    """Forget, at the end, the names that were registered since the beginning."""
    registries = {
        id(value): value
        for name, module in list(sys.modules.items())
        if name.startswith("jaxmodels.")
        for value in vars(module).values()
        if isinstance(value, Registry)
    }
    before = {key: dict(registry._registered) for key, registry in registries.items()}
    yield
    for key, registry in registries.items():
        registry._registered.clear()
        registry._registered.update(before[key])


@pytest.fixture(scope="module", autouse=True)
def names_of_one_module() -> Iterator[None]:
    """Forget, after each module, the names that its shared fixtures registered."""
    yield from forget_names()


@pytest.fixture(autouse=True)
def names_of_one_test() -> Iterator[None]:
    """Forget, after each test, the names that it registered: the next one in this process chooses among its own."""
    yield from forget_names()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: $JAXMODELS_SHARED_DATA, or shared/data beside the repository."""
    path = Path(os.environ.get("JAXMODELS_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"needs the real data sets: no folder {path}; set JAXMODELS_SHARED_DATA")
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
