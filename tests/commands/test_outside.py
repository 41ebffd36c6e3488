"""A command is one file, in this package or in another one that is installed or can be imported."""

import pytest

from jaxmodels.cli import main

COMMAND = '''"""`jaxmodels greet NAME [--times N]`: a greeting of a package of its own."""

from jaxmodels.errors import UserError


def greet(name: str, /, times: int = 1) -> int:
    """Greet someone.

    Args:
        name: who is greeted.
        times: how often.
    """
    if not name:
        raise UserError("got no name, expected one, try greet world")
    print("hello " * times + name)
    return 3
'''
CONFIGURED = '''"""`jaxmodels data count CONFIG.py`: a command that takes a config and its fields."""

from jaxmodels.commands.options import Configured


def count(given: Configured) -> None:
    """Print the steps."""
    print(given.config.train.steps, given.overrides)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that is installed with two commands, and one whose module is gone."""
    (tmp_path / "greetings").mkdir()
    (tmp_path / "greetings" / "__init__.py").touch()
    (tmp_path / "greetings" / "greet.py").write_text(COMMAND)
    (tmp_path / "greetings" / "count.py").write_text(CONFIGURED)
    info = tmp_path / "greetings-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greetings\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[jaxmodels.commands]\ngreet = greetings.greet:greet\ndata count = greetings.count:count\n"
        "lost = nowhere.at_all:lost\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_a_command_of_an_installed_package_is_listed_and_run(package, root, capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert "greet NAME [--times N]" in listed and "a greeting of a package of its own" in listed
    assert "lost" in listed and "cannot be imported" in listed
    assert main(["greet", "world", "--times", "2"]) == 3
    assert capsys.readouterr().out == "hello hello world\n"
    assert main(["greet", "world", "--tims", "2"]) == 2
    assert "did you mean '--times'?" in capsys.readouterr().err
    assert main(["gret"]) == 2
    assert "did you mean 'greet'?" in capsys.readouterr().err
    assert main(["lost"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: got command nowhere.at_all:lost") and error.count("\n") == 1


def test_it_may_be_one_of_a_group_and_take_a_config(package, root, capsys):
    assert main(["data"]) == 0
    assert "data count CONFIG.py" in capsys.readouterr().out
    assert main(["data", "count", str(root / "configs/gpt_stdlib.py"), "--train.steps", "7"]) == 0
    assert capsys.readouterr().out == "7 ['--train.steps', '7']\n"
    assert main(["data", "cont"]) == 2
    assert "expected one of inspect, prepare, clean, train-tokenizer, count, did you mean 'count'?" in (
        capsys.readouterr().err
    )


def test_it_may_be_named_by_its_module(package, capsys):
    assert main(["greetings.greet:greet", "you"]) == 3
    assert capsys.readouterr().out == "hello you\n"
    assert main(["greetings.greet:gret", "you"]) == 2
    assert "did you mean 'greet'?" in capsys.readouterr().err
