"""Four nodes of eight H100s: `jaxmodels launch launch/slurm_h100.py -- train configs/gpt_stdlib.py --mesh.fsdp 32`."""

from jaxmodels.launch.slurm import Slurm


def get_place() -> Slurm:
    return Slurm(nodes=4, processes=8, devices=1, platform="gpu", gres="gpu:8", cpus=64, time="12:00:00")
