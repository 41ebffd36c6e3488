"""The files of an imported model: their repetition penalty is applied, and what else they ask is named."""

import json
import logging

import pytest

from jaxmodels.errors import UserError
from jaxmodels.generate import asked
from jaxmodels.hf.beside import KEPT


def run_with(folder, name="generation_config.json", **settings):
    (folder / KEPT).mkdir()
    (folder / KEPT / name).write_text(json.dumps(settings))
    return folder


def test_what_changes_nothing_is_neither_applied_nor_named(tmp_path, caplog):
    run = run_with(
        tmp_path, eos_token_id=2, repetition_penalty=1.0, no_repeat_ngram_size=0, suppress_tokens=None, min_length=0
    )
    assert asked.repetition_penalty(run) == 1.0 and not caplog.records
    assert asked.repetition_penalty(tmp_path / "trained here") == 1.0


def test_what_is_not_applied_is_named_in_one_line(tmp_path, caplog):
    run = run_with(tmp_path, repetition_penalty=1.3, no_repeat_ngram_size=3, suppress_tokens=[7, 9])
    with caplog.at_level(logging.WARNING, "jaxmodels"):
        assert asked.repetition_penalty(run) == 1.3
    [line] = [record.message for record in caplog.records]
    assert line.endswith("ask for it: no_repeat_ngram_size 3, suppress_tokens [7, 9]")


def test_settings_of_config_json_count_where_there_is_no_other_file(tmp_path):
    assert asked.repetition_penalty(run_with(tmp_path, "config.json", repetition_penalty=1.1, model_type="gpt2")) == 1.1


@pytest.mark.parametrize("value", [0, -1, "much", False])
def test_a_penalty_that_is_no_positive_number_is_refused(value, tmp_path):
    with pytest.raises(UserError, match="got repetition_penalty .* expected a number above 0"):
        asked.repetition_penalty(run_with(tmp_path, repetition_penalty=value))


def test_a_file_that_asks_for_draws_says_how_and_one_that_does_not_says_nothing(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
    told = {"temperature": 0.6, "top_p": 0.9}
    assert asked.drawing(run_with(tmp_path / "a", do_sample=True, **told)) == {**told, "top_k": 50}
    assert asked.drawing(run_with(tmp_path / "b", do_sample=True, top_k=0)) == {"temperature": 1.0, "top_p": 1.0}
    assert asked.drawing(run_with(tmp_path / "c", **told)) == {} == asked.drawing(tmp_path / "trained here")
    with pytest.raises(UserError, match="got top_p 3 .* expected a number from 0 to 1"):
        asked.drawing(run_with(tmp_path / "d", do_sample=True, top_p=3))


def test_a_search_is_what_the_file_asks_and_limits_that_it_does_not_follow_are_named(tmp_path, caplog):
    assert asked.searching(tmp_path / "trained here") == {"beams": 4, "alpha": 1.0, "early_stopping": None}
    told = {"num_beams": 6, "length_penalty": 2, "early_stopping": True}
    run = run_with(tmp_path, max_length=142, forced_bos_token_id=0, **told)
    assert asked.searching(run) == {"beams": 6, "alpha": 2.0, "early_stopping": True}
    with caplog.at_level(logging.WARNING, "jaxmodels"):
        asked.say_what_no_search_follows(run)
    [line] = [record.message for record in caplog.records]
    assert line.endswith("ask for it: max_length 142")
    for name, wrong in ("num_beams", 0), ("length_penalty", "long"), ("early_stopping", 1), ("early_stopping", "no"):
        (run / KEPT / "generation_config.json").write_text(json.dumps({**told, name: wrong}))
        with pytest.raises(UserError, match=f"got {name} "):
            asked.searching(run)
