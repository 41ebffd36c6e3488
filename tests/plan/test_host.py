"""What a step keeps in host memory: counted, copied, and refused where the host has not enough."""

import dataclasses
import re

import pytest

from jaxmodels.config import AdamW
from jaxmodels.plan import figures
from tests.plan.test_compile import CONFIG, GIB, PARAMETERS, sent

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("on", ["h100:1x8", "v5e:2x4"])
def test_an_optimizer_with_the_host_is_copied_from_there_and_back(planned, on):
    plan = planned(on, dataclasses.replace(CONFIG, optim=AdamW(offload=True)))
    memory, here = plan["memory"], planned(on, CONFIG)["memory"]
    assert memory["optimizer"] == 8, "its two counts"
    assert memory["host"] == here["optimizer"] - 8
    assert memory["arguments"] == pytest.approx(here["arguments"] - memory["host"], abs=4096)
    copied = sum(each["bytes"] for each in plan["transfers"] if each["link"] == "host")
    # a GPU's kernels read it where it lies
    assert copied == pytest.approx(memory["host"] * (1 if on.startswith("h100") else 2), rel=0.01)
    assert plan["step_seconds"] > planned(on, CONFIG)["step_seconds"]


@pytest.mark.parametrize(("on", "layers", "length"), [("h100:1x8", 8, 512), ("v5e:2x4", 4, 2048)])
def test_blocks_whose_inputs_are_on_the_host_need_less_of_the_device(planned, on, layers, length):
    data = dataclasses.replace(CONFIG.data, seq_len=length)
    plans = []
    for remat in ("full", "offload"):
        model = dataclasses.replace(CONFIG.model, context=length, layers=layers, remat=remat)
        plans.append(planned(on, dataclasses.replace(CONFIG, model=model, data=data)))
    inputs = layers * (64 // 8) * length * 512 * 2  # of all blocks, in bfloat16
    # a few are still on the device: under way, or in use
    assert inputs / 2 < plans[0]["memory"]["peak"] - plans[1]["memory"]["peak"] <= inputs
    copied = sum(each["bytes"] for each in plans[1]["transfers"] if each["link"] == "host")
    # there and back; a TPU's peeled loop copies one more
    assert 2 * inputs <= copied <= 2 * inputs + inputs / layers
    assert [plan["memory"]["host_saved"] for plan in plans] == [0, inputs]


def test_a_block_that_is_computed_again_gathers_its_weights_no_more_often_than_one_that_is_not(planned):
    model = dataclasses.replace(CONFIG.model, layers=8, remat="full")
    gathered = sent(planned("h100:1x8", dataclasses.replace(CONFIG, model=model)))["all-gather", ("fsdp",)]
    blocks = 8 * (PARAMETERS - 2 * 4096 * 512 - 5 * 512)  # twice the layers, and two bytes for each number
    assert 2 * blocks <= gathered < 2.4 * blocks


def test_a_step_whose_hosts_have_too_little_memory_does_not_fit_and_says_by_how_much(planned, compiled):
    model = dataclasses.replace(CONFIG.model, context=512, layers=8, remat="offload")
    cfg = dataclasses.replace(CONFIG, model=model, optim=AdamW(offload=True))
    made = compiled("h100:1x8", cfg)
    needed = planned("h100:1x8", cfg)["memory"]["host"] + 8 * (64 // 8) * 512 * 512 * 2

    def on(host):
        row = dataclasses.replace(made.topology.hardware, host_memory=host)
        there = dataclasses.replace(made, topology=dataclasses.replace(made.topology, hardware=row))
        plan = figures.figures(cfg, there)
        return plan, figures.figures_table(cfg, plan)

    plan, text = on(needed - 1)
    assert not plan["fits"] and plan["shortage"].startswith(f"needs {needed / GIB:.2f} GiB of host memory a device")
    assert "IT DOES NOT FIT: needs" in text
    assert "the host is full: try --model.remat full or --optim.offload False" in text
    plan, text = on(needed)
    assert plan["fits"] and "it fits" in text and re.search(r"on its host .* \(optimizer .*, inputs of blocks", text)
    plan, text = on(0.0)
    assert plan["fits"] and "of an unknown size a device" in text


def test_where_no_rate_of_the_link_to_the_host_is_published_memory_is_told_and_no_time(compiled):
    cfg = dataclasses.replace(CONFIG, optim=AdamW(offload=True))
    made = compiled("v5e:2x4", cfg)
    on = dataclasses.replace(made.topology, hardware=dataclasses.replace(made.topology.hardware, host=0.0))
    plan = figures.figures(cfg, dataclasses.replace(made, topology=on))
    assert plan["fits"] and plan["memory"]["peak"] == made.peak and "step_seconds" not in plan
    assert plan["uncounted"] == ["copies between v5e and its host, whose link has no published rate"]
