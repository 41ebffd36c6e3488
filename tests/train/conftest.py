"""A state on eight devices, a folder with two checkpoints, and runs that end without their picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxmodels.train.checkpoint import Checkpointer
from tests.train.checkpoints import (
    State,
    make_mesh,
    make_state,
    save,
)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out curves.png, which takes as long as a short run; tests/report draws it, and tests/docs with its run."""
    monkeypatch.setattr("jaxmodels.report.curves.draw", lambda run, out, lines=None: None)


@pytest.fixture
def state() -> State:
    return make_state(make_mesh(4, 2), 1)


@pytest.fixture(scope="module")
def saved_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for step in (1, 2):
        save(Checkpointer(folder), step, make_state(make_mesh(8), step))
    return folder
