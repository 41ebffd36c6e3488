"""Damage to files, as hypothesis draws it, and the claim that it is met by one line.

Each test draws few examples, the same ones each time. By hand, more and other ones: JAXMODELS_FUZZ=5000 pytest
tests/test_fuzz*.py.
"""

import contextlib
import json
import os
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from jaxmodels.cli import explain, main

FEW = int(os.environ.get("JAXMODELS_FUZZ", "0"))


def drawn(examples):
    """So many examples of a test in CI, or as many as JAXMODELS_FUZZ says."""
    return settings(
        max_examples=FEW or examples,
        derandomize=not FEW,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )


DEEP = "\0deep\0"
BYTES = st.sampled_from(
    [b"", b"\0", b"\xff\xfe", b"null", b"{}", b"[]", b"-1", b'"', b",", b"\n", b"\r", b"}", b"\x1b[2J", b"[" * 100_000]
)
VALUES = st.sampled_from(
    [
        None, True, False, -1, 0, 1, 2, 1.5, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**400, "", "x", "\0",
        "../..", "\ud800", "\x1b[2J\n", "9" * 5000, [], {}, [[]], [None], {"": None}, [1, "x"], DEEP,
    ]
)  # fmt: skip


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """A file in which something is cut out, put in or, where it is JSON, changed at one place of its tree."""
    if draw(st.booleans()):
        rows = whole.split(b"\n")
        line = draw(st.integers(0, len(rows) - 1))
        for before, text, after in ([], whole, []), (rows[:line], rows[line], rows[line + 1 :]):
            with contextlib.suppress(ValueError):
                changed = json.dumps(draw(elsewhere(json.loads(text))))
                changed = changed.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()
                return changed if text is whole else b"\n".join([*before, changed, *after])
    at = draw(st.integers(0, len(whole)))
    gone = draw(st.sampled_from([0, 1, 4, 100, len(whole)]))
    return whole[:at] + draw(BYTES) + whole[at + gone :]


@st.composite
def elsewhere(draw, value):
    """A value of JSON that differs in one place of its tree."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key = draw(st.sampled_from(keys))
    how = draw(st.sampled_from(["in", "in", "in", "gone", "more"]))
    if how == "in":
        inner = draw(elsewhere(value[key]))
        return {**value, key: inner} if isinstance(value, dict) else [*value[:key], inner, *value[key + 1 :]]
    if isinstance(value, list):
        return value[:key] + value[key + 1 :] if how == "gone" else [*value, value[key]]
    rest = {name: each for name, each in value.items() if name != key or how == "more"}
    return {**rest, draw(st.sampled_from(["", "x", "\ud800", key.upper()])): value[key]} if how == "more" else rest


def taken_or_refused(do, *args, **kwargs):
    """Call a function, whose error, if there is one, has a message of one line."""
    try:
        do(*args, **kwargs)
    except Exception as error:
        message, code = explain(error)
        if message is None:
            raise
        assert code in (1, 2) and "\n" not in message


def ends_in_one_line(argv, capsys, lines=1):
    """Run a command, which ends with 0, 1 or 2 and, where it failed, one line; nothing is said of a fault of ours."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    said = capsys.readouterr().err
    assert code in (0, 1, 2) and (said.count("\n") <= lines), (argv, said)
    assert "Traceback" not in said and "a fault of jaxmodels" not in said, (argv, said)
    assert code == 0 or said.rstrip("\n").rpartition("\n")[2].startswith("error: "), (argv, said)
    return code


def tree(folder: Path):
    """Every file below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
