"""Text from a trained model: sampling with a key-value cache."""

from jaxmodels.generate.sample import sample

__all__ = ["sample"]
