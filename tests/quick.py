"""Flags with which XLA compiles a test's program for a CPU in about half the time; it runs slower, which few notice."""

from importlib.metadata import version

_OWN = {  # XLA ends the process at a flag that it does not know
    "0.10": "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false",
    "0.12": "--xla_cpu_parallel_codegen_split_count=1",
}
FLAGS = f"--xla_backend_optimization_level=0 {_OWN.get('.'.join(version('jaxlib').split('.')[:2]), '')}".strip()
