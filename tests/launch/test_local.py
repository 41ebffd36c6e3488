"""What the place that is this machine starts."""

from __future__ import annotations

import pytest

from jaxmodels.errors import UserError
from jaxmodels.launch.ranks import Assignment, environments


def test_gpus_are_shared_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for devices in (2, None):
        found = environments(2, devices, "auto", Assignment(0, 4, 6, "node0:20000"))
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment in found] == ["3,5", "6,7"]
        assert [environment["JAXMODELS_PROCESS_ID"] for environment in found] == ["4", "5"]
        assert all("JAX_PLATFORMS" not in environment for environment in found)


def test_more_gpus_than_there_are_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(UserError, match="got 2 processes with 2 GPUs each, expected at most the 2 visible here"):
        environments(2, 2, "gpu", Assignment(0, 0, 2, "127.0.0.1:20000"))
