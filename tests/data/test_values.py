"""Values of records: what does not match its field is bad, and named; nothing is rounded or wrapped in silence."""

import numpy as np
import pytest

from jaxmodels.data.records import Field
from jaxmodels.data.values import unfit
from jaxmodels.errors import UserError

CLASS, FREE = Field("label", ("low", "high")), Field("label")
SEVERAL, READING = Field("labels", ("low", "high")), Field("array", shape=(2,), dtype="float32")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (CLASS, 0.5, "x is 0.5, expected a class from 0 to 1"),
        (CLASS, "low", "x is 'low', expected a class from 0 to 1"),
        (CLASS, None, "x is None, expected a class from 0 to 1"),
        (CLASS, np.float32(1), "expected a class from 0 to 1"),
        (CLASS, 2, "x is 2, expected a class from 0 to 1"),
        (CLASS, -2, "x is -2, expected a class from 0 to 1"),
        (FREE, 2**31, "x is 2147483648, expected a class from 0 to"),
        (SEVERAL, [0, 1], "x is [0, 1], expected a tuple of classes"),
        (SEVERAL, (0, 0.5), "x is 0.5, expected a class from 0 to 1"),
        (SEVERAL, (-1,), "x is -1, expected a class from 0 to 1"),
        (READING, [1.0, 2.0], "x is [1.0, 2.0], expected an array of float32"),
        (READING, np.array(["a", "b"]), "x is an array of <U1, expected float32"),
        (READING, np.array([1j, 0]), "x is an array of complex128, expected float32"),
        (READING, np.array([1, None]), "x is an array of object, expected float32"),
        (READING, np.array([1e300, 0]), "x holds 1e+300, expected numbers that float32 holds"),
        (READING, np.array([np.nan, 0]), "x holds nan, expected finite numbers"),
        (READING, np.ones(3), "x has the shape (3,), expected (2,)"),
        (Field("array", dtype="int32"), np.array(0.5), "x is an array of float64, expected int32"),
        (Field("text"), b"bytes", "x is b'bytes', expected text"),
        (Field("text"), 3, "x is 3, expected text"),
        (Field("text"), " ", "is an empty text"),
        (Field("image"), "cat.png", "x is 'cat.png', expected the bytes of an image file, or an array of uint8"),
        (
            Field("image"),
            np.zeros((2, 2, 3)),
            "x is float64 of the shape (2, 2, 3), expected uint8 (height",
        ),
        (
            Field("image"),
            np.zeros((2, 2), np.uint8),
            "x is uint8 of the shape (2, 2), expected uint8 (height",
        ),
    ],
)
def test_a_value_that_is_not_what_its_field_says_is_bad(field, value, reason):
    assert reason in unfit("x", value, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (CLASS, np.uint8(1)),
        (CLASS, -1),  # an unknown one
        (FREE, 2**31 - 1),
        (SEVERAL, (1, np.int64(0))),
        (SEVERAL, ()),
        (READING, np.array([1e38, -2], np.float64)),
        (READING, np.array([True, False])),
        (READING, np.array([3, 4], np.int64)),
        (Field("array", shape=(None,)), np.ones(5, np.float16)),
        (Field("text"), "a"),
        (Field("image"), b"png"),
        (Field("image", shape=(None, None, 1)), np.zeros((2, 2, 1), np.uint8)),
    ],
)
def test_a_value_that_is_what_its_field_says_is_good(field, value):
    assert unfit("x", value, field) == ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "sound"}, r"got Field\('sound'\), expected one of image, text, label, labels, array"),
        ({"kind": "lable"}, "did you mean 'label'?"),
        ({"kind": "array", "dtype": "flaot32"}, "dtype='flaot32'.*, expected that of numbers, try 'float32'"),
        ({"kind": "array", "dtype": "object"}, "dtype='object'"),
        ({"kind": "label", "names": "low"}, "names='low'.*, expected a tuple of names of classes"),
        ({"kind": "label", "names": (0, 1)}, "expected a tuple of names of classes"),
        ({"kind": "array", "shape": 3}, "shape=3.*, expected a tuple of sizes, or None"),
    ],
)
def test_a_field_of_an_unknown_kind_or_dtype_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        Field(**fields)
