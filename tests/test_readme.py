"""The README's code runs as written."""

import re


def test_the_library_example_trains(root):
    block = re.search(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S)
    assert block is not None
    scope: dict = {}
    exec(block.group(1), scope)
    _, _, second = scope["step"](scope["params"], scope["state"])
    assert float(second) < float(scope["value"])
    assert scope["model"].axes()["layers"]["attn"]["q"]["w"] == ("layers", "embed", "heads", "head_dim")


def test_the_commands_it_names_exist(root):
    from benchmarks.__main__ import BENCHMARKS
    from jaxmodels.cli import COMMANDS

    text = (root / "README.md").read_text()
    assert set(re.findall(r"^\s*jaxmodels (\w+)", text, re.M)) <= set(COMMANDS)
    assert set(re.findall(r"python -m benchmarks (\w+)", text)) <= set(BENCHMARKS)
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (root / path).exists(), path
