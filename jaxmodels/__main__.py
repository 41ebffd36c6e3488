"""`python -m jaxmodels` is `jaxmodels`."""

from jaxmodels.cli import process

if __name__ == "__main__":  # not where a worker process imports it
    process()
