"""A slice of 16 spot TPUs v6e: `jaxmodels launch launch/tpu_v6e.py --image IMAGE -- train configs/gpt_stdlib.py`."""

from jaxmodels.launch.tpu import TPU


def get_place() -> TPU:
    return TPU(
        tpu="v6e:4x4",
        zone="us-east5-b",
        image="us-docker.pkg.dev/my-project/images/jaxmodels:latest",
        setup=(
            "sudo mkdir -p /mnt/runs",
            "mountpoint -q /mnt/runs || sudo gcsfuse -o allow_other my-bucket /mnt/runs",
        ),
        mounts=("/mnt/runs:/app/runs",),
    )
