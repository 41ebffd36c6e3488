"""Batches of the data are checked against what the task takes."""

import numpy as np
import pytest

from jaxmodels.data.contract import BatchField, check_batch
from jaxmodels.errors import UserError


@pytest.mark.parametrize(
    ("shape", "dtype", "labels", "hint"),
    [
        ((2,), np.float32, np.zeros(8, np.int32), "try without --task.multi-label"),
        ((), np.int32, np.zeros((8, 2), np.float32), "try --task.multi-label True"),
        ((2,), np.float32, np.zeros((8, 3), np.float32), "try another --data.label-field"),
    ],
)
def test_labels_that_a_task_does_not_take_are_refused_with_what_to_set(shape, dtype, labels, hint):
    with pytest.raises(UserError, match=f"got labels of shape .*, expected .*, {hint}"):
        check_batch({"labels": BatchField(shape, dtype)}, {"labels": labels})
