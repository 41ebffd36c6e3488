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
