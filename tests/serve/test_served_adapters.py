"""Runs with an adapter beside their base: each by its own name, merged, and no run is taken for one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jaxmodels.cli import main
from jaxmodels.config import AdamW, CausalLM, Config, Init, LoRA, Metrics, Text, Train
from jaxmodels.generate.sample import sample
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.serve.opened import open_adapters, open_model
from jaxmodels.serve.server import make_served
from jaxmodels.serve.service import Service
from jaxmodels.train import load_run
from jaxmodels.train import run as runs
from tests.serve.serving import Engine, live


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "a.txt").write_text("one two three, four five six.\n" * 100)
    config = Config(
        model=GPT2Config(vocab_size=256, context=32, layers=1, width=16, heads=2),
        task=CausalLM(),
        data=Text(path=(str(folder / "a.txt"),), tokenizer="bytes", seq_len=16, batch_size=8),
        optim=AdamW(peak_lr=3e-2, warmup_steps=0),
        train=Train(steps=2),
        metrics=Metrics(every=100, progress="none", loggers=()),
    )
    runs.train(config, folder / "base")
    adapted = replace(config, init=Init(source=str(folder / "base")), adapter=LoRA(rank=2, targets=("layers/*",)))
    runs.train(replace(adapted, train=Train(steps=6)), folder / "mine")
    return folder


def test_a_base_and_its_adapter_each_answer_as_sample_does_with_their_run(folder):
    opened = [open_model(folder / "base"), *open_adapters([f"mine={folder / 'mine'}"], ["base"])]
    small = {"rows": 1, "length": 32, "chunks": (16,)}
    with live(opened[0], **small) as running:
        service: Service = running.service
        service.served["mine"] = make_served(opened[1], lambda writer: Engine(writer.model, writer.params, **small))
        service.served["mine"].prepare(lambda _: None)
        said = {}
        for name, run in (("tiny", "base"), ("mine", "mine")):
            body = {"model": name, "prompt": "one", "max_tokens": 20, "temperature": 0}
            found = running.ask("POST", "/v1/completions", body)[1]["choices"][0]["text"]
            own = load_run(folder / run)
            ids = own.tokenizer.encode("one")
            want = sample(own.model, own.params["model"], ids, 20, temperature=0)[0, len(ids) :]
            said[name] = found
            assert found == own.tokenizer.decode(np.asarray(want))
        assert said["tiny"] != said["mine"]
        service.served["mine"].stop()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["mine"], "got --adapter mine, expected NAME=DIR, try --adapter mine=mine"),
        (["base={base}"], "which is no run with an adapter, expected one that was trained with --adapter"),
        (["x=/nowhere"], "which is no run with an adapter"),
        (["m={mine}", "m={mine}"], "whose name another model has"),
        (["model={mine}"], "whose name another model has"),
    ],
)
def test_what_is_no_adapter_of_a_name_of_its_own_is_refused(folder, given, message, capsys):
    given = [each.format(base=folder / "base", mine=folder / "mine") for each in given]
    argv = ["serve", str(folder / "base"), "--name", "model", "--port", "0", "--adapter", *given]
    assert main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
