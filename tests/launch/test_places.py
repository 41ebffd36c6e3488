"""The files in `launch/` are places that render, and say how they are called."""

import ast
from pathlib import Path

import pytest

from jaxmodels.launch.record import place_in
from tests.launch.jobs import ROOT, job

FILES = sorted(path.name for path in (ROOT / "launch").glob("*.py"))


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_folder_is_a_place_and_says_how_it_is_called(name: str, tmp_path: Path) -> None:
    place = place_in(ROOT / "launch" / name)
    assert all(place.render(job(tmp_path)).values())
    said = ast.get_docstring(ast.parse((ROOT / "launch" / name).read_text())) or ""
    assert f"jaxmodels launch launch/{name} " in said
