"""The names that moved to `model`, `families` and `checks`, until all who import them here have followed."""

from jaxmodels.models.checks import check_patches, check_shape, divide, halvings  # noqa: F401
from jaxmodels.models.families import (  # noqa: F401
    FAMILIES,
    create,
    family,
    family_of,
    list_models,
    preset,
    register,
)
from jaxmodels.models.model import Dtype, Family, Model, Params, Remat, functional, quantized  # noqa: F401
