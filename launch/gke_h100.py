"""Four machines of eight H100s: `jaxmodels launch launch/gke_h100.py --image IMAGE -- train configs/gpt_stdlib.py`."""

from jaxmodels.launch.kubernetes import Kubernetes


def get_place() -> Kubernetes:
    return Kubernetes(
        image="us-docker.pkg.dev/my-project/images/jaxmodels:latest",
        nodes=4,
        gpus=8,
        processes=8,
        selectors=("cloud.google.com/gke-accelerator=nvidia-h100-80gb",),
        claims=("runs:/app/runs",),
        queue="gpu-queue",
    )
