"""One process in the background."""

from own_launcher import Background


def get_place() -> Background:
    return Background(processes=1)
