"""This machine, as two processes."""

from jaxmodels.launch.local import Local


def get_place() -> Local:
    return Local(processes=2)
