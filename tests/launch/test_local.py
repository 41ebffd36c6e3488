"""What the place that is this machine starts."""

from __future__ import annotations

import pytest

from jaxmodels.errors import UserError
from jaxmodels.launch.node import Node, _environments


def test_gpus_are_shared_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    environments = _environments(Node(processes=2, devices=2))
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["3,5", "6,7"]
    assert all("JAX_PLATFORMS" not in environment for environment in environments)


def test_more_gpus_than_there_are_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(UserError, match="got 2 processes with 2 GPUs each, expected at most the 2 visible here"):
        _environments(Node(processes=2, devices=2, platform="gpu"))
