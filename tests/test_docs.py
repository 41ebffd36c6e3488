"""The generated pages are current, and no file outgrows a sitting."""

import importlib.util
import re
import subprocess


def test_the_page_of_fields_is_current(root):
    spec = importlib.util.spec_from_file_location("generate", root / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root / "docs" / "config.md").read_text() == module.page(), "run python docs/generate.py"


def test_every_field_is_documented():
    import dataclasses
    from typing import get_type_hints

    from jaxmodels import config
    from jaxmodels.launch import place
    from jaxmodels.models import families

    kinds = [kind for kind in get_type_hints(config.Config).values() if dataclasses.is_dataclass(kind)]
    kinds += [families.family(name).config for name in families.FAMILIES.names()]
    kinds += [place.PLACES.find(name) for name in place.PLACES.builtin]
    for kind in kinds:
        assert {f.name for f in dataclasses.fields(kind)} <= set(config.docs(kind)), kind


def test_no_file_is_longer_than_400_lines(root):
    files = [p for room in ("jaxmodels", "launch", "benchmarks", "configs") for p in (root / room).rglob("*.py")]
    long = {str(p.relative_to(root)): n for p in files if (n := p.read_text().count("\n")) > 400}
    assert not long


def test_the_extras_of_the_readme_exist(root):
    import tomllib

    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"EXTRA=(\w+)", (root / "README.md").read_text() + (root / "Makefile").read_text())
    assert set(named) <= set(extras) and named


def test_no_machine_path_is_committed(root):
    found = subprocess.run(
        [
            "git",
            "grep",
            "-nE",
            r"(^|[^A-Za-z0-9_.$-])/(work|root|home)/[a-z]",
            "--",
            "*.py",
            "*.md",
            "*.toml",
            "Makefile",
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    lines = [line for line in found.stdout.splitlines() if "tests/test_docs.py" not in line]
    assert found.returncode in (0, 1, 128) and not lines, lines
