"""This machine, as two processes: `jaxmodels launch launch/local.py -- train configs/gpt_stdlib.py --mesh.fsdp 2`."""

from jaxmodels.launch.local import Local


def get_place() -> Local:
    return Local(processes=2)
