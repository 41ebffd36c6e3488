"""What makes tests quick, and the same on every machine."""

import re
from importlib.metadata import version

_OWN = {  # XLA ends the process at a flag that it does not know
    "0.10": "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false",
    "0.12": "--xla_cpu_parallel_codegen_split_count=1",
}
# XLA compiles a program for a CPU in about half the time with these; it runs slower, which few notice
FLAGS = f"--xla_backend_optimization_level=0 {_OWN.get('.'.join(version('jaxlib').split('.')[:2]), '')}".strip()

_OTHERS = re.compile(
    r"WARNING: All log messages before absl|[IWE]\d{4} \d\d:\d\d|[IWE]0000 |\d{4}-\d\d-\d\d \d\d:\d\d:.*: [IWE] "
    r"|To enable the following instructions: .*, rebuild TensorFlow"
)


def own_lines(stderr: str) -> list[str]:
    """What a process wrote to stderr, without the logs of C++ libraries, which say what hardware they do not find."""
    return [line for line in stderr.splitlines() if not _OTHERS.match(line)]


def kind(registry, name, **fields):
    """A section of the kind of that name, with those of the fields that it has."""
    found = registry.find(name)
    return found(**{field: value for field, value in fields.items() if field in found.__dataclass_fields__})


def stacked(scan):
    """What a scan gives of each turn, as abstract values with a dimension of the turns, in any version of jax."""
    body, length = scan.params["jaxpr"], scan.params["length"]
    pairs = zip(scan.outvars, getattr(body, "jaxpr", body).outvars, strict=True)
    return [out.aval for out, inner in pairs if out.aval.shape == (length, *inner.aval.shape)]
