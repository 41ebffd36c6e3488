from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxmodels.config import Table
from jaxmodels.data.fields import input_field, named_field
from jaxmodels.data.records import Bad, Field, Joined, Reader, Records, hash_fraction
from jaxmodels.errors import UserError


class Numbers(Records):
    """The numbers from 0 on as texts, some of them bad."""

    def __init__(self, n: int, bad: Sequence[int] = (), name: str = "numbers") -> None:
        self.n, self.bad, self.label, self.fingerprint = n, frozenset(bad), name, f"{name} {n}"
        self.fields = {"text": Field("text"), "label": Field("label")}

    def __len__(self) -> int:
        return self.n

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        values = {i: {"text": f"{self.label} {i}", "label": i % 2} for i in indices}
        return [
            Bad(f"file:{i}", "is torn") if i in self.bad else {name: values[i][name] for name in fields}
            for i in indices
        ]


def texts(reader: Reader, indices: Sequence[int]) -> list[str]:
    return [row["text"] for row in reader.rows(indices)[0]]


def test_the_next_good_record_stands_in_for_a_bad_one():
    reader = Reader(Numbers(10, bad=[3, 4, 9]), ["text"], 5)
    rows, replaced = reader.rows(np.array([2, 3, 4, 9, 3]))
    assert [row["text"] for row in rows] == [f"numbers {i}" for i in (2, 5, 5, 0, 5)]
    assert [row.index for row in rows] == [2, 5, 5, 0, 5]
    assert replaced.tolist() == [False, True, True, True, True] and reader.left_out == 3


def test_what_is_read_does_not_depend_on_what_was_read_before():
    order = np.random.default_rng(0).permutation(50)
    first, second = (Reader(Numbers(50, bad=range(7, 23)), ["text"], 20) for _ in range(2))
    one_by_one = {int(i): texts(first, [i])[0] for i in order}
    assert texts(second, list(range(50))) == [one_by_one[i] for i in range(50)]


def test_a_bad_record_is_named_once(caplog):
    reader = Reader(Numbers(10, bad=[3, 4]), ["text"], 5)
    with caplog.at_level(logging.WARNING, "jaxmodels"):
        for _ in range(3):
            reader.rows([3, 4, 3])
            assert sum(len(rows) for rows in reader.all()) == 8
    assert [r.getMessage() for r in caplog.records] == ["left out file:3: is torn", "left out file:4: is torn"]


def test_all_gives_every_good_record_in_order():
    reader = Reader(Numbers(3000, bad=[0, 1500, 2999]), ["text"], 3)
    rows = [row for some in reader.all() for row in some]
    assert [row.index for row in rows] == [i for i in range(3000) if i not in (0, 1500, 2999)]
    assert rows[1]["text"] == "numbers 2" and reader.left_out == 3


@pytest.mark.parametrize("read", [lambda r: list(r.all()), lambda r: r.rows(range(10)), lambda r: r.rows([3])])
def test_more_bad_records_than_the_limit_stop_the_run(read):
    bad = [3, 4, 5]
    read(Reader(Numbers(10, bad), ["text"], 3))
    with pytest.raises(
        UserError,
        match=r"^got 3 bad records in numbers \(the last: file:3: is torn; .*file:5: is torn\), "
        r"expected at most 2, .* --data.bad-records 20$",
    ):
        read(Reader(Numbers(10, bad), ["text"], 2))


def test_a_record_found_bad_later_is_left_out_from_then_on(caplog):
    reader = Reader(Numbers(10, bad=[4]), ["text"], 2)
    [row], _ = reader.rows([3])
    reader.bad(row.index, "is no image")
    reader.bad(row.index, "is no image")
    assert caplog.messages == ["left out numbers, record 3: is no image"]
    rows, replaced = reader.rows([3, 5])
    assert [row.index for row in rows] == [5, 5] and replaced.tolist() == [True, False]
    with pytest.raises(UserError, match="got 3 bad records .* record 8: is no image"):
        reader.bad(8, "is no image")


def test_nothing_but_bad_records_ends():
    with pytest.raises(UserError, match="all 4 records of which are bad"):
        Reader(Numbers(4, bad=range(4)), ["text"], 10).rows([2])
    with pytest.raises(UserError, match="all 4 records of which are bad"):
        list(Reader(Numbers(4, bad=range(4)), ["text"], 10).all())


def test_threads_count_a_bad_record_once(caplog):
    reader = Reader(Numbers(200, bad=range(0, 200, 4)), ["text"], 50)
    threads = [threading.Thread(target=lambda: [reader.rows([i]) for i in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reader.left_out == len(caplog.messages) == 50


def test_joined_sets_read_as_one():
    joined = Joined([Numbers(5, bad=[1], name="a"), Numbers(3, name="b")], ["text", "text"])
    assert len(joined) == 8 and list(joined.fields) == ["text"] and joined.where(6) == "b, record 1"
    found = joined.read([7, 0, 1, 5], ["text"])
    assert found[0] == {"text": "b 2"} and found[1] == {"text": "a 0"} and found[3] == {"text": "b 0"}
    assert str(found[2]) == "file:1: is torn"


def test_the_input_field_is_found_or_asked_for():
    records = Numbers(3)
    records.fields = {"en": Field("text"), "de": Field("text"), "picture": Field("image"), "label": Field("label")}
    assert input_field(records, Table(target_field="de"), ("text",)) == "en"
    assert input_field(records, Table(), ("image", "text")) == "picture"
    with pytest.raises(UserError, match="got no data.input_field, expected one of de, en, try --data.input-field de"):
        input_field(records, Table(), ("text",))
    with pytest.raises(UserError, match="got data.input_field 'picture', which is an image, not a text, .* de, en"):
        input_field(records, Table(input_field="picture"), ("text",))
    with pytest.raises(UserError, match="'labl', expected one of label, try --data.label-field label"):
        named_field(records, "label_field", "labl", ("label",))
    with pytest.raises(UserError, match=r"the fields de \(text\), .*, picture \(image\), expected an array field"):
        input_field(records, Table(), ("array",))


def test_places_are_even_and_a_function_of_the_content():
    places = np.array([hash_fraction(f"record {i}".encode()) for i in range(20_000)])
    assert abs((places < 0.1).mean() - 0.1) < 0.01 and places.min() >= 0 and places.max() < 1
    assert hash_fraction(b"record 7") == places[7]
