"""Two slices of 16 TPUs v5e on GKE: `jaxmodels launch launch/gke_v5e.py --image IMAGE -- train configs/CONFIG.py`."""

from jaxmodels.launch.kubernetes import Kubernetes


def get_place() -> Kubernetes:
    return Kubernetes(
        image="us-docker.pkg.dev/my-project/images/jaxmodels:latest",
        tpu="v5e:2x4x4",
        claims=("runs:/app/runs",),
        queue="multislice-queue",
        topology="cloud.google.com/gke-nodepool",
        host_network=True,
    )
