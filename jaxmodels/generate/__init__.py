"""Generate text with a trained model: sampling and translation, with a key-value cache."""

from jaxmodels.generate.beam import Decoded, decode
from jaxmodels.generate.sample import sample
from jaxmodels.generate.translation import bleu, translate_texts

__all__ = ["Decoded", "bleu", "decode", "sample", "translate_texts"]
