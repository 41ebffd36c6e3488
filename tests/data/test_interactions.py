"""Histories of users: what is before a day and what is new after it, and the examples made of them."""

from __future__ import annotations

import csv
import json
import logging

import numpy as np
import pytest

from jaxmodels.config import Interactions, NextItem
from jaxmodels.data import Split, open_records, open_source
from jaxmodels.data.contract import IGNORED
from jaxmodels.errors import UserError

DAY = 86_400
ROWS = [  # user, item, day; anna takes two items on one day and one of them again
    ("anna", "b", 1), ("anna", "a", 1), ("anna", "c", 2), ("anna", "a", 5), ("anna", "d", 6),
    ("bert", "a", 2), ("bert", "b", 3), ("bert", "e", 7), ("bert", "c", 9),
    ("carl", "d", 6),
    ("dora", "e", 1), ("dora", "a", 2),
]  # fmt: skip
NAMES = {"a": "apple", "b": "bread", "c": "cheese", "d": "", "e": "apple"}


def write(path, head, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return str(path)


@pytest.fixture
def shop(tmp_path):
    """A section for a small shop, with fields of one's own."""
    rows = [(user, item, day * DAY) for user, item, day in ROWS[::-1]]
    log = write(tmp_path / "log.csv", ("user", "item", "time"), rows)
    items = write(tmp_path / "items.csv", ("item", "description"), NAMES.items())
    return lambda **fields: Interactions(**{"path": (log,), "items": (items,), "seq_len": 4, **fields})


def told(records):
    """Each user's history and what is held, by name."""
    users, items = records.fields["user"].names, records.fields["items"].names
    rows = records.read(range(len(records)), ("user", "items", "times", "held"))
    return {
        users[row["user"]]: (
            [items[i] for i in row["items"]],
            (row["times"] // DAY).tolist(),
            [items[i] for i in row["held"]],
        )
        for row in rows
    }


def test_by_time_new_items_from_a_day_on_are_to_be_predicted_from_those_before(shop):
    cfg = shop(eval_from="1970-01-06")  # day 5
    assert told(open_records(cfg, "train")) == {
        "anna": (["apple", "bread", "cheese"], [1, 1, 2], []),
        "bert": (["apple", "bread"], [2, 3], []),
        "dora": (["apple (4)", "apple"], [1, 2], []),
    }
    assert told(open_records(cfg, "eval")) == {
        "anna": (["apple", "bread", "cheese"], [1, 1, 2], ["d"]),  # not the apple, which she had
        "bert": (["apple", "bread"], [2, 3], ["cheese", "apple (4)"]),
    }
    until = shop(eval_from="1970-01-06", eval_until="1970-01-09")
    assert told(open_records(until, "eval"))["bert"][2] == ["apple (4)"]
    early = shop(eval_from="1970-01-06", train_until="1970-01-03")
    assert told(open_records(early, "train")) == {"anna": (["apple", "bread"], [1, 1], [])}


def test_without_a_day_the_last_item_of_each_user_is(shop):
    found = told(open_records(shop(), "eval"))
    assert {user: held for user, (_, _, held) in found.items()} == {
        "anna": ["d"],
        "bert": ["cheese"],
        "dora": ["apple"],
    }
    assert told(open_records(shop(), "train"))["bert"] == (["apple", "bread", "apple (4)"], [2, 3, 7], [])


def test_rows_that_are_no_interaction_are_named_and_counted(tmp_path, shop, caplog):
    rows = [("u", "a", 5), ("u", "b", 9), ("u", "zzz", 6), ("", "a", 3), ("u", "a", "noon"), ("u", "a", "inf")]
    path = write(tmp_path / "bad.csv", ("user", "item", "time"), rows)
    with caplog.at_level(logging.WARNING, "jaxmodels"):
        assert told(open_records(shop(path=(path,)), "eval")) == {"u": (["apple"], [0], ["bread"])}
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert all(part in said for part in ("bad.csv:4: item is 'zzz'", "user is missing", "'noon'", "'inf'"))
    with pytest.raises(UserError, match="4 bad rows.*at most 2"):
        open_records(shop(path=(path,), bad_records=2), "train")
    with pytest.raises(UserError, match="without the column 'customer'"):
        open_records(shop(user_field="customer"), "train")


def test_a_column_of_names_without_items_is_refused(shop):
    with pytest.raises(UserError, match="got data.name_field title without data.items"):
        shop(items=(), name_field="title")


def test_users_are_told_apart_by_value_and_times_by_fractions(tmp_path):
    rows = [(7, "a", 1.25), (7.0, "b ", 1.5), ("7", "c", 1.75), (float("nan"), "a", 1), ([7], "a", 1), (True, "a", 1)]
    rows += [("7", "a", 1_320_105_600_000), ("7", "a", True), ("7", "a", 10**400)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(dict(zip(("user", "item", "time"), row, strict=True))) + "\n" for row in rows))
    records = open_records(Interactions(path=(str(path),), bad_records=6), "eval")
    assert records.fields["user"].names == ("7",) and records.fields["items"].names == ("a", "b", "c")
    (row,) = records.read([0], ("items", "times", "held"))
    assert (row["items"], row["times"].tolist(), row["held"]) == ((0, 1), [1.25, 1.5], (2,))
    with pytest.raises(UserError, match="6 bad rows"):
        open_records(Interactions(path=(str(path),), bad_records=5), "eval")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"eval_from": "soon"}, "expected a day"),
        ({"eval_until": "2011-11-01"}, "without data.eval_from"),
        ({"train_until": "2011-11-01"}, "without data.eval_from"),
        ({"train_until": "2011-11-01", "eval_from": "2011-10-01"}, "before data.train_until"),
        ({"eval_until": "2011-10-01", "eval_from": "2011-10-01"}, "a later day"),
    ],
)
def test_days_that_do_not_fit_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        Interactions(**fields)


def test_what_was_trained_on_is_never_what_is_predicted(shop):
    cfg = shop(eval_from="1970-01-06")
    later = cfg.evaluated_on({"eval_from": "1970-01-09"})
    assert told(open_records(later, "eval"))["bert"] == (["apple", "bread", "apple (4)"], [2, 3, 7], ["cheese"])
    with pytest.raises(UserError, match="before data.train_until"):
        cfg.evaluated_on({"eval_from": "1970-01-03"})
    with pytest.raises(UserError, match="before data.train_until"):
        cfg.evaluated_on({"eval_from": "1970-01-03", "path": cfg.path})
    other = cfg.evaluated_on({"eval_from": "1970-01-03", "path": ("other.csv",)})
    assert other.path == ("other.csv",) and not other.train_until, "of whom nothing was trained on"
    with pytest.raises(UserError, match="all but the last item"):
        shop().evaluated_on({"eval_from": "1970-01-06"})


def sequences(cfg, split: Split = "train", classes=(), **task):
    return open_source(cfg, split, NextItem(**task), classes=classes)


def test_rows_end_at_the_right_and_evaluation_has_all_that_was_seen(shop):
    source = sequences(shop(eval_from="1970-01-06", seq_len=2), "eval")
    batch = source.batch(np.arange(2), np.zeros(2, int))
    assert batch["tokens"].tolist() == [[1, 2], [0, 1]] and (batch["targets"] == IGNORED).all()
    assert batch["seen"].tolist() == [[0, 1, 2], [0, 1, -1]] and batch["held"].tolist() == [[3, -1], [2, 4]]
    longer = sequences(shop(eval_from="1970-01-06"), "eval").batch(np.arange(2), np.zeros(2, int))
    assert longer["tokens"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]
    assert longer["segment_ids"].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]


def test_a_target_is_the_item_that_follows_and_a_basket_has_no_order(shop):
    source = sequences(shop(eval_from="1970-01-06"))
    epochs = np.arange(200)
    batch = source.batch(np.zeros(200, int), epochs)
    firsts = batch["tokens"][:, 2]
    assert 60 < (firsts == 0).sum() < 140, "apple and bread were taken at one time"
    np.testing.assert_array_equal(batch["tokens"][:, 3], 1 - firsts)
    np.testing.assert_array_equal(batch["targets"][:, 2:], np.stack([1 - firsts, np.full(200, 2)], 1))
    assert (batch["targets"][:, :2] == IGNORED).all()
    again = source.batch(np.zeros(1, int), epochs[7:8])
    assert all((again[name] == batch[name][7:8]).all() for name in batch), "a function of epoch and index"


def test_with_a_horizon_a_target_comes_of_later_baskets(shop):
    source = sequences(shop(), horizon=2)
    batch = source.batch(np.zeros(300, int), np.arange(300))  # anna: {a, b} c a, and d is held
    assert set(map(tuple, batch["targets"][:, 1:].tolist())) == {(x, y, 0) for x in (0, 2) for y in (0, 2)}, (
        "behind the basket c and a, behind c a alone"
    )
    most = {x: (batch["targets"][:, 1] == x).mean() for x in (0, 2)}
    assert all(0.4 < share < 0.6 for share in most.values())


def test_a_long_history_makes_several_rows_that_have_each_target_once(shop):
    source = sequences(shop(eval_from="1970-01-20", seq_len=2))
    rows = source.batch(np.arange(len(source)), np.zeros(len(source), int))
    counted = (rows["targets"] >= 0).sum()
    assert counted == sum(
        len(items) - 1 for items, _, _ in told(open_records(shop(eval_from="1970-01-20"), "train")).values()
    )


def test_old_targets_count_half_as_often_each_half_life(shop):
    source = sequences(shop(eval_from="1970-01-20"), half_life=3.0)  # the newest interaction is of day 9
    each = np.arange(len(source))
    batches = [source.batch(each, np.full(len(source), epoch)) for epoch in range(1500)]
    counts = {}
    for batch in batches:
        for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
            if tokens[1:] == [0, 1, 4]:  # bert, of days 2, 3, 7, 9
                for place, target in enumerate(targets):
                    counts[place] = counts.get(place, 0) + (target >= 0)
    shares = np.array([counts[place] for place in (1, 2, 3)]) / counts[3]
    np.testing.assert_allclose(shares, [0.5**2, 0.5 ** (2 / 3), 1], atol=0.04)
    # rows end on days 6 (anna), 9 (bert) and 2 (dora)
    assert counts[3] / 1500 == pytest.approx(3 / (1 + 0.5 + 0.5 ** (7 / 3)), rel=0.05)


def test_of_the_targets_that_count_so_many_are_drawn(shop):
    source, whole = (sequences(shop(eval_from="1970-01-20"), half_life=3.0, places=n) for n in (2, None))
    batch, all_of_them = (each.batch(np.ones(500, int), np.arange(500)) for each in (source, whole))
    there = np.take_along_axis(all_of_them["targets"], batch["at"], 1)
    np.testing.assert_array_equal(batch["targets"], there)
    np.testing.assert_array_equal((there >= 0).sum(1), np.minimum((all_of_them["targets"] >= 0).sum(1), 2))
    assert len({tuple(row) for row in batch["at"].tolist()}) > 2


def test_other_items_than_those_of_training_are_refused(shop):
    sequences(shop(), "eval", classes=("apple", "bread", "cheese", "d", "apple (4)"))
    with pytest.raises(UserError, match="the same 2 in the same order"):
        sequences(shop(), "eval", classes=("apple", "bread"))
    with pytest.raises(UserError, match="--model.vocab-size 5"):
        open_source(shop(), "train", NextItem(), vocab_size=4)
    with pytest.raises(UserError, match="data.label_field 'price'.*does not use"):
        sequences(shop(label_field="price"))
