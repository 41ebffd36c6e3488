"""What one process does by itself; several real processes are in tests/launch/test_node.py."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import jax
import pytest

from jaxmodels.errors import UserError
from jaxmodels.parallel import distributed

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAXMODELS_NUM_PROCESSES": "2", "JAXMODELS_PROCESS_ID": "1"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = SLURM | {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "2"}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of jax.distributed.initialize, which is not carried out."""
    calls: list[dict[str, Any]] = []
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "JAXMODELS_", "JAX_COORDINATOR", "TPU_", "KUBERNETES_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return calls


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM,  # a batch script, or a shell in an allocation
        STEP | {"SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "localhost"},
        EXPLICIT | {"JAXMODELS_NUM_PROCESSES": "1", "JAXMODELS_PROCESS_ID": "0"},
    ],
)
def test_a_process_alone_joins_nobody(
    environment: dict[str, str], joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hook = sys.excepthook
    distributed.initialize()
    assert joined == []
    assert sys.excepthook is hook


@pytest.mark.parametrize(
    "environment",
    [
        STEP,
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
        {"JAX_PLATFORMS": "tpu,cpu", "TPU_WORKER_HOSTNAMES": "a,b"},
        {"JAX_PLATFORMS": "", "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
    ],
)
def test_among_others_jax_finds_the_peers(
    environment: dict[str, str], joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert len(joined) == 1 and "num_processes" not in joined[0]
    assert 10 <= joined[0]["heartbeat_timeout_seconds"] <= 30 >= joined[0]["shutdown_timeout_seconds"] >= 10


def test_a_job_of_which_only_some_variables_are_there_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")

    def initialize(**given: Any) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"got .*OMPI_COMM_WORLD_SIZE.*\(coordinator_address should be defined"):
        distributed.initialize()


def test_a_launcher_s_word_goes_before_a_cluster_s(
    joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (STEP | EXPLICIT).items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    (call,) = joined
    assert (call["coordinator_address"], call["num_processes"], call["process_id"]) == ("127.0.0.1:1", 2, 1)
    assert call["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"JAXMODELS_PROCESS_ID": "2"}, "got JAXMODELS_PROCESS_ID=2 with JAXMODELS_NUM_PROCESSES=2"),
        ({"JAXMODELS_NUM_PROCESSES": "two"}, "got JAXMODELS_NUM_PROCESSES='two', expected a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": None}, "without JAX_COORDINATOR_ADDRESS"),
        ({"JAXMODELS_PROCESS_ID": None}, "without JAXMODELS_PROCESS_ID"),
        ({"JAXMODELS_HEARTBEAT_SECONDS": "soon"}, "got JAXMODELS_HEARTBEAT_SECONDS='soon'"),
    ],
)
def test_variables_that_contradict_each_other_are_a_mistake(
    changed: dict[str, str | None], said: str, joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (EXPLICIT | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        distributed.initialize()
    assert joined == []


def test_a_machine_name_without_an_address_is_said_before_gloo_fails(
    joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: "nosuchname.invalid")
    with pytest.raises(UserError, match="got a machine name nosuchname.invalid that has no address"):
        distributed.initialize()


def test_a_machine_name_that_others_cannot_reach_is_warned_of(
    joined: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: "debian")
    monkeypatch.setattr("socket.gethostbyname", {"debian": "127.0.1.1", "10.0.0.1": "10.0.0.1"}.__getitem__)
    distributed.initialize()
    assert "debian has the address 127.0.1.1, which no other machine can reach" in capsys.readouterr().err
    assert len(joined) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_for_a_stop_and_the_handlers_are_put_back(number: signal.Signals, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "_leave_terminal", lambda: None)

    def before(number: int, frame: Any) -> None:
        pass

    outside = signal.signal(number, before)  # tests that run under nohup have SIGHUP ignored
    try:
        with distributed.Preemption() as preemption:
            assert not preemption.requested(3) and preemption.step is None
            signal.raise_signal(number)
            assert preemption.requested(4) and preemption.requested(5)
            assert preemption.step == 4
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, outside)


def test_a_second_ctrl_c_ends_at_once_but_not_one_after_sigterm() -> None:
    with distributed.Preemption():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # a third one ends the process without a word


def test_under_nohup_the_end_of_a_terminal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert not preemption.requested(1)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_alone_the_exit_code_is_handed_back(code: int) -> None:
    assert distributed.finalize(code) == code
