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


def test_the_run_example_loads_a_run_without_its_data(root, tmp_path, monkeypatch, capsys):
    import jaxmodels
    from jaxmodels.config import Config, Metrics, Text, Train
    from jaxmodels.models.gpt2 import GPT2Config
    from tests.sections import untrained

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("def main(): pass\n" * 40)
    cfg = Config(
        model=GPT2Config(vocab_size=256, context=64, layers=1, heads=2, width=8),
        data=Text(path=("a.txt",), seq_len=16, batch_size=8),
        train=Train(steps=1),
        metrics=Metrics(progress="none", loggers=()),
    )
    untrained(cfg, tmp_path / "runs" / "gpt_stdlib")
    (tmp_path / "a.txt").unlink()
    (block,) = [
        b for b in re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.S) if "load_run" in b
    ]
    scope: dict = {"jaxmodels": jaxmodels}
    exec(block, scope)
    assert scope["logits"].shape == (1, 8, 256) and [len(row) for row in scope["rows"]] == [28, 26]
    assert capsys.readouterr().out.startswith("class ")


def test_the_commands_it_names_exist(root):
    from benchmarks.__main__ import BENCHMARKS
    from jaxmodels.commands import COMMANDS

    text = (root / "README.md").read_text()
    assert set(re.findall(r"^\s*jaxmodels (\w+)", text, re.M)) <= {name.partition(" ")[0] for name in COMMANDS.builtin}
    assert set(re.findall(r"python -m benchmarks (\w+)", text)) <= set(BENCHMARKS)
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (root / path.partition("#")[0]).exists(), path


def test_the_slowest_tests_that_are_named_are_there(root):
    lines = (root / "tests" / "slow.txt").read_text().splitlines()
    for line in (line for line in lines if not line.startswith("#")):
        file, _, function = line.partition("::")
        assert (root / file).exists(), line
        assert f"def {function.partition('[')[0]}" in ((root / file).read_text() if function else "def "), line
