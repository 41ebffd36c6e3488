"""The record of `python -m benchmarks published`."""

import json

from benchmarks import published, record


def row(name, error, commit, fitted=""):
    return {"name": name, "error": error, "commit": commit, "fitted": fitted}


def test_rows_that_are_predicted_again_replace_theirs_in_the_record(tmp_path):
    names = list(published.ROWS)[:3]
    old = [{key: value for key, value in row(name, 0.2, "").items() if key != "commit"} for name in names]
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"commit": "0123456789abcdef", "rows": old}))
    rows = published.merged({names[1]: row(names[1], -0.1, "new", "yes")}, path)
    assert [(each["name"], each["error"], each["commit"]) for each in rows] == [
        (names[0], 0.2, "0123456789ab"),
        (names[1], -0.1, "new"),
        (names[2], 0.2, "0123456789ab"),
    ]
    assert published.summary(rows) == [
        "mean absolute error of 3 rows: 16.7%",
        "mean absolute error of 2 of them by which no constant was chosen: 20.0%",
        "mean absolute error of 2 rows predicted at 0123456789ab: 20.0%",
        "mean absolute error of 1 rows predicted at new: 10.0%",
    ]
    assert published.merged({}, tmp_path / "none.json") == []


def test_a_job_half_way_between_two_steps_takes_the_mean_of_their_times(monkeypatch):
    kept, full = (published.language(published.LLAMA3, rows, 8, published.V3) for rows in (1, 2))
    rate = {1: 300.0, 2: 100.0}
    monkeypatch.setattr(
        published,
        "planned",
        lambda _, cfg: ("tokens", {"per_second_device": rate[cfg.data.batch_size], "memory": {"peak": 0}, "fits": 1}),
    )
    found = published.compare("job", published.Row(150.0, "h100:1x8", kept, "source", other=full))
    assert found["predicted"] == 150.0, "6 tokens take 20 ms in one and 60 ms in the other, 40 ms half-way"
    assert found["percent"] == "+0.0%" and "half-way to remat full" in found["settings"]


def test_the_record_in_the_repository_is_of_jobs_that_there_are():
    rows = json.loads((record.RESULTS / f"{published.RECORD}.json").read_text())["rows"]
    assert {each["name"] for each in rows} <= set(published.ROWS)
    for each in rows:
        assert each["measured"] == published.ROWS[each["name"]].measured
        assert (each["error"] is None) == (each["predicted"] is None)
