"""The doctor names the rank that is slow, that computes wrong, or that lacks memory, and a healthy machine passes."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxmodels import cli, commands
from jaxmodels.launch import checks, collectives, doctor
from jaxmodels.parallel.mesh import Mesh, make_mesh


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(root: Path, folder: Path, sick: str, *options: str) -> list[tuple[int, str]]:
    """Exit code and output of four processes that examine themselves."""
    port, processes = free_port(), []
    for rank in range(4):
        environment = {
            **{name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
            "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "SICK": sick, "JAXMODELS_NUM_PROCESSES": "4",
            "JAXMODELS_PROCESS_ID": str(rank), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            **({"JAX_DEFAULT_MATMUL_PRECISION": "highest"} if rank == 3 else {}),
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.launch.sick", "--run-dir", str(folder), *options]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, cwd=root, **streams))
    return [(process.wait(timeout=120), process.stdout.read()) for process in processes]


def test_of_four_ranks_the_slow_the_wrong_and_the_short_one_are_named(root: Path, tmp_path: Path):
    sick = "slow:1,wrong:2,short:3"
    (code, said), *others = ranks(root, tmp_path, sick, "--mesh.data", "2", "--mesh.fsdp", "2")
    assert code == 1, said
    off = [line for line in said.splitlines() if line.startswith("OFF: ")]

    def of(rank: int) -> str:
        return "\n".join(line for line in off if line.startswith(f"OFF: rank {rank} on {socket.gethostname()}"))

    assert "matrix product" in of(1) and "the median is" in of(1)
    assert "computes matrix products wrong: 1 row(s)" in of(2)
    assert "sends or receives wrong parts in all_gather along data" in of(2)
    assert "memory 1 GiB, the median is" in of(3)
    assert "has variable JAX_DEFAULT_MATMUL_PRECISION highest, the others not at all" in of(3)
    assert "wrong" not in of(0) + of(1) + of(3)
    assert "all_reduce along fsdp=2" in said
    assert [code for code, _ in others] == [1, 1, 1], others
    assert list(tmp_path.iterdir()) == []


def test_one_process_examines_all_its_devices_and_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setattr(doctor, "SLOW", {"cpu": 0.0})  # eight devices share two cores
    monkeypatch.setattr(doctor, "DISK", 0.0)
    monkeypatch.setattr(doctor, "ROOM", 0.0)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])  # two of them are examined alone
    assert cli.main(["doctor", "--run-dir", str(tmp_path / "none"), "--mesh.tensor", "2", "--mesh.fsdp", "2"]) == 0
    said = capsys.readouterr().out
    assert "1 process(es) on 1 host(s), 2 device(s) cpu, mesh data=2 fsdp=2 tensor=2" in said
    assert all(f"{kind} along {axis}=2" in said for kind in collectives.SENT for axis in ("data", "fsdp", "tensor"))
    assert "nothing is off" in said and not (tmp_path / "none").exists() and list(tmp_path.iterdir()) == []


def test_a_place_is_short_for_a_launch(monkeypatch: pytest.MonkeyPatch):
    called: list[Any] = []
    real = commands.run
    monkeypatch.setattr(commands, "run", lambda name, argv: called.append((name, argv)) or 0)
    assert real("doctor", ["local", "--mesh.fsdp", "4"]) == 0
    asked = ["local", "--restarts", "0", "--", "doctor", "--run-dir=runs", "--mesh.fsdp=4"]
    assert called == [("launch", asked)]


def test_each_collective_says_whose_part_is_wrong(monkeypatch: pytest.MonkeyPatch):
    mesh = make_mesh(Mesh(data=4, tensor=2))
    right = collectives.contribution
    assert all(not each["wrong"] for each in collectives.measure(mesh))

    def broken(place: int, count: int) -> Any:
        out = right(place, count)
        if place == 5 and sys._getframe(1).f_code.co_name == "piece":
            out[:] += 1
        return out

    monkeypatch.setattr(collectives, "contribution", broken)
    for each in collectives.measure(mesh):
        group = {5, 4} if each["axis"] == "tensor" else {5, 7, 1, 3}
        wanted = {
            "all_gather": {(place, 5) for place in group},
            "all_to_all": {(place, 5) for place in group},
            "permute": {(4 if each["axis"] == "tensor" else 7, 5)},
        }.get(each["kind"], {(place, -1) for place in group})
        assert set(each["wrong"]) == wanted, each


def report(**more: Any) -> dict[str, Any]:
    device = {
        "kind": "NVIDIA H100 80GB HBM3", "platform": "gpu",
        "memory": {"limit": 80e9, "free": 79e9, "given": True},
        "product": {"flops": 700e12, "wrong": 0, "changing": False},
        "stream": {"bandwidth": 2.9e12, "wrong": 0}, "copies": {"to": 20e9, "back": 12e9, "wrong": 0},
    }  # fmt: skip
    disk = {"path": __file__, "write": 1e9, "read": 2e9, "free": 1e12, "problem": ""}
    made = {"host": "n", "versions": {"jax": "1"}, "environment": {}, "devices": {"cuda:0": device}, "disk": disk}
    return copy.deepcopy({**made, "clock": [10.0, 11.0, 12.0], "ports": [], "collectives": [], **more})


def changed(field: str, **values: Any) -> dict[str, Any]:
    made = report()
    made["devices"]["cuda:0"][field] |= values
    return made


@pytest.mark.parametrize(
    ("second", "wanted"),
    [
        (changed("product", flops=400e12), "matrix product 400 TFLOP/s, the median is 700"),
        (changed("product", changing=True), "computes matrix products wrong: it changes between runs"),
        (changed("stream", wrong=3), "memory loses additions: 3 wrong"),
        (changed("copies", wrong=1), "copies from the host come back changed: 1 wrong"),
        (changed("memory", given=False), "cannot have 58.9 GiB that are said to be free"),
        (changed("memory", free=20e9), "memory 18.63 GiB, the median is 73.57"),
        (report(devices={"cuda:0": {"kind": "NVIDIA H100 80GB HBM3", "platform": "gpu", "problem": "X"}}), "): X"),
        (report(versions={"jax": "2"}), "has jax 2, the others 1"),
        (report(clock=[15.0, 16.0, 17.5]), "its clock is 5.0 s ahead"),
        (report(disk=report()["disk"] | {"free": 1e9}), "has 1.0 GB left"),
        (report(disk=report()["disk"] | {"path": "/nowhere/x"}), "which rank 0 does not see"),
        (report(disk=report()["disk"] | {"problem": "Permission denied"}), "Permission denied"),
        (report(ports=["cannot reach rank 2 at a:1: timed out"]), "cannot reach rank 2 at a:1: timed out"),
    ],
)
def test_what_is_off_is_said_of_its_rank(second: dict[str, Any], wanted: str):
    off = doctor.judge({0: report(), 1: second, 2: report(), 3: report()}, [(i, "cuda:0") for i in range(4)])
    assert len(off) == 1 and off[0].startswith("rank 1 on n") and wanted in off[0], off


def test_accelerators_are_held_to_the_table_even_where_all_are_alike():
    off = doctor.judge({rank: changed("stream", bandwidth=1e12) for rank in range(2)}, [])
    assert len(off) == 2 and "memory bandwidth 1,000 GB/s, h100 should have 3,352" in off[1]
    assert doctor.judge({rank: report() for rank in range(2)}, []) == []


def test_a_receiver_of_wrong_parts_from_several_is_at_fault_itself():
    one = {"axis": "data", "kind": "all_gather", "devices": 4, "bandwidth": 1e9}
    second = report(collectives=[{**one, "wrong": [[1, 0], [1, 2], [1, 3]]}])
    off = doctor.judge({0: report(), 1: second, 2: report()}, [(i, "cuda:0") for i in range(4)])
    assert len(off) == 1 and "rank 1 on n (cuda:0): sends or receives wrong parts in all_gather along data" in off[0]


def test_memory_of_a_host_is_what_its_own_limit_leaves():
    import resource

    limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + 2**30
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        assert 0.9 * 2**30 < checks.host_memory() <= 2**30 + 2**20
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
