"""Checks by one process of its machine and its devices before a job: whether results are right, and how fast.

The numbers computed are small integers, exact in every type that is used, so that a single wrong bit shows.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "jaxmodels", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "libtpu", "jax-cuda12-plugin",
    "jax-cuda13-plugin", "nvidia-nccl-cu12", "nvidia-cudnn-cu12",
)  # fmt: skip
CHANGING = (
    "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DEFAULT_DTYPE_BITS", "JAX_DISABLE_JIT", "JAX_DEBUG_NANS",
    "JAX_DEBUG_INFS", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "JAX_THREEFRY_PARTITIONABLE",
    "JAX_TRACEBACK_FILTERING", "JAX_LOG_COMPILES", "JAX_CHECK_TRACER_LEAKS", "XLA_FLAGS", "LIBTPU_INIT_ARGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR",
    "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME", "NCCL_ALGO",
    "NCCL_PROTO", "OMP_NUM_THREADS",
)  # fmt: skip
"""Environment variables that change what JAX computes, how fast, or what it logs."""

_MB = 1_000_000


def surroundings() -> dict[str, Any]:
    """Return the versions of the packages that compute, and the variables that change what they do."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": versions,
        "environment": {name: os.environ[name] for name in CHANGING if name in os.environ},
    }


def best_of(times: int, work: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of several runs, since other work may slow some of them down."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def operands(size: int) -> tuple[Any, Any]:
    """Make two matrices of integers from -3 to 3, whose product is exact in bfloat16 with sums in float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, (size, size)).astype(np.float32) for _ in range(2))
    return a, b


def multiply(a: Any, b: Any) -> Any:
    """Compute the product under test."""
    return _compiled()(a, b)


@functools.cache
def _compiled() -> Callable[[Any, Any], Any]:
    import jax
    import jax.numpy as jnp

    return jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))


def product(device: Any) -> dict[str, Any]:
    """Measure the FLOP/s of a matrix product on a device, and count its wrong rows.

    The host checks it with n^2 operations instead of n^3: C x must equal A (B x) for a random vector x of integers.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    fast = device.platform != "cpu"
    size, times = (8192, 20) if fast else (512, 5)
    a, b = operands(size)
    dtype = jnp.bfloat16 if fast else jnp.float32
    left, right = (jax.device_put(x.astype(dtype), device) for x in (a, b))
    first = multiply(left, right).block_until_ready()

    def run() -> None:
        out = first
        for _ in range(times):
            out = multiply(left, right)
        out.block_until_ready()

    seconds = best_of(3, run) / times
    found = np.asarray(multiply(left, right))
    x = np.random.default_rng(1).integers(-1000, 1001, size).astype(np.float64)
    wanted = a.astype(np.float64) @ (b.astype(np.float64) @ x)
    blocks = [found[at : at + 1024].astype(np.float64) @ x for at in range(0, size, 1024)]
    return {
        "flops": 2 * size**3 / seconds,
        "wrong": int(np.sum(np.concatenate(blocks) != wanted)),
        "changing": not bool(jnp.array_equal(first, jax.device_put(found, device))),
    }


def stream(device: Any) -> dict[str, Any]:
    """Measure the bandwidth of a device's memory by adding 1 to an array, and count the wrong results."""
    import jax
    import jax.numpy as jnp

    size = 2**26 if device.platform != "cpu" else 2**22
    add = jax.jit(lambda x: x + 1)
    start = jax.device_put(jnp.arange(size, dtype=jnp.int32), device)
    out = add(start).block_until_ready()
    times = 10

    def run() -> None:
        nonlocal out
        out = start
        for _ in range(times):
            out = add(out)
        out.block_until_ready()

    seconds = best_of(3, run) / times
    return {"bandwidth": 2 * 4 * size / seconds, "wrong": int(jnp.sum(out != start + times))}


def copies(device: Any) -> dict[str, Any]:
    """Measure the bytes per second from the host to a device and back, and count the bytes that came back wrong.

    A CPU device shares the host's memory, so there is no link to measure.
    """
    import jax
    import numpy as np

    size = 256 * _MB if device.platform != "cpu" else 16 * _MB
    given = np.random.default_rng(2).integers(0, 256, size, dtype=np.uint8)
    there = jax.device_put(given, device).block_until_ready()
    if device.platform == "cpu":
        return {"to": 0.0, "back": 0.0, "wrong": int(np.sum(np.asarray(there) != given))}
    to = best_of(3, lambda: jax.device_put(given, device).block_until_ready())
    # an array keeps the copy that was made of it, so each needs its own
    fresh = iter([jax.device_put(given, device).block_until_ready() for _ in range(2)])
    back = best_of(2, lambda: np.asarray(next(fresh)))
    return {"to": size / to, "back": size / back, "wrong": int(np.sum(np.asarray(there) != given))}


def memory(device: Any) -> dict[str, Any]:
    """Return the memory limit of a device, its free bytes, and whether most of them can be allocated.

    For a CPU, these are what the kernel, the container's limit and the process's own limit leave.
    """
    import jax
    import jax.numpy as jnp

    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        free = host_memory()
        return {"limit": free, "free": free, "given": True}
    limit, used = stats["bytes_limit"], stats.get("bytes_in_use", 0)
    try:
        with jax.default_device(device):
            jnp.zeros(int(0.8 * (limit - used)), jnp.uint8).block_until_ready().delete()
        given = True
    except jax.errors.JaxRuntimeError:  # it is out of memory
        given = False
    return {"limit": limit, "free": limit - used, "given": given}


def host_memory() -> int:
    """Return how many bytes this process can still allocate: within the machine, its container and its own limit."""
    import resource

    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            free.append(limit - pages * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free))


def disk(folder: Path, name: str) -> dict[str, Any]:
    """Measure the disk of a folder, or of its nearest parent that exists: speed, free space, and problems.

    The file stays until `forget`, so that other processes can check that they see it.
    """
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    path = folder.absolute() / name
    content = os.urandom(_MB) * 32
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        write = time.perf_counter() - began
        with path.open("rb") as file:
            with contextlib.suppress(OSError, AttributeError):  # what was just written is in memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            wrong = file.read() != content
        read = time.perf_counter() - began
    except OSError as error:
        return {"path": str(path), "problem": error.strerror or type(error).__name__}
    return {
        "path": str(path),
        "write": len(content) / write,
        "read": len(content) / read,
        "free": shutil.disk_usage(folder).free,
        "problem": "what is read is not what was written" if wrong else "",
    }


def forget(found: dict[str, Any]) -> None:
    """Remove the file that `disk` wrote."""
    with contextlib.suppress(OSError):
        Path(found["path"]).unlink()


def local(run_dir: Path, rank: int) -> dict[str, Any]:
    """Run all checks that need no other process."""
    import jax

    devices: dict[str, Any] = {}
    for device in jax.local_devices():
        try:
            devices[str(device)] = {
                "kind": device.device_kind,
                "platform": device.platform,
                "memory": memory(device),
                "product": product(device),
                "stream": stream(device),
                "copies": copies(device),
            }
        except Exception as error:  # whatever it is, rank 0 must report it
            message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            devices[str(device)] = {"kind": device.device_kind, "platform": device.platform, "problem": message}
    return {**surroundings(), "devices": devices, "disk": disk(run_dir, f".doctor-{os.getpid()}-{rank}")}
