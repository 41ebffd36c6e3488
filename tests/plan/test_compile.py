"""Steps compiled for hardware that is not here: what they hold, whether they fit, and what they send."""

import collections
import dataclasses
import json
import re
import subprocess
import types

import jax
import pytest

from jaxmodels import cli
from jaxmodels.config import GAN, Classification, Config, MaskedLM, Mesh, Synthetic, Tokens, Train
from jaxmodels.errors import UserError
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.gan import GANConfig
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mixtral import MixtralConfig
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.resnet import ResNetConfig
from jaxmodels.parallel import hardware
from jaxmodels.plan import figures, hlo, products, program
from tests.sections import task_of
from tests.zoo import ZOO

GIB = 2**30
# two compilations for TPUs take minutes on a busy machine
pytestmark = pytest.mark.timeout(900)

CONFIG = Config(
    model=LlamaConfig(
        vocab_size=4096, context=512, layers=2, heads=4, kv_heads=2, width=512, mlp_width=1024, dtype="bfloat16"
    ),
    data=Tokens(seq_len=512, batch_size=64),
    mesh=Mesh(data=1, fsdp=8),
)
PARAMETERS = 2 * 4096 * 512 + 2 * (512 * (4 + 2 + 2 + 4) * 128 + 3 * 512 * 1024 + 2 * 512) + 512


@pytest.mark.parametrize("on", ["h100:1x8", "v5e:2x4"])
def test_a_device_holds_what_arithmetic_says(planned, on):
    plan = planned(on, CONFIG)
    memory = plan["memory"]
    assert plan["parameters"] == PARAMETERS
    assert memory["parameters"] == memory["gradients"] == 4 * (PARAMETERS - 5 * 512) / 8 + 4 * 5 * 512
    assert memory["optimizer"] == 2 * memory["parameters"] + 8, "two moments, and two counts"
    assert memory["batch"] == 2 * 64 * 512 * 4 / 8, "tokens and targets"
    held = sum(memory[name] for name in ("parameters", "optimizer", "average", "statistics", "batch", "rest"))
    padding = 512 * 8 if on.startswith("v5e") else 0  # a TPU pads its few scalars
    assert held <= memory["arguments"] <= held + padding
    assert plan["fits"]


@pytest.mark.parametrize("on", ["h100:1x8", "v5e:2x4"])
def test_the_compiled_step_computes_the_model_and_of_causal_attention_the_blocks_that_are_seen(planned, on):
    plan = planned(on, CONFIG)
    tokens, layers = 64 * 512, 2
    attention = 3 * layers * 2 * 2 * tokens * 512 * 4 * 128
    assert plan["model_flops"] == 6 * tokens * (PARAMETERS - 5 * 512 - 4096 * 512) + attention
    least = plan["model_flops"] - attention / 2 * (1 - 1 / 512)
    assert plan["model_flops_causal"] == pytest.approx(least, rel=1e-6)
    # fused kernels compute the scores anew in the backward pass: a product more than six, or three in two kernels,
    # and splash, by which blocks of 512 are computed whole, what the mask hides too
    more = attention / 2 / 6 if on.startswith("h100") else attention
    assert plan["hardware_flops"] == pytest.approx(least + more, rel=0.02)
    assert 0 < plan["mfu_causal"] < plan["mfu"] < 1
    assert plan["step_seconds"] >= max(plan["seconds"].values())


SMALL = 64 * 2**10
"""Bytes of what is summed over all devices in any case: losses, norms' parameters and their gradients."""


def sent(plan):
    """Bytes by kind and mesh axes of what is more than a few numbers."""
    found = {}
    for each in plan["transfers"]:
        key = each["kind"], tuple(each["axes"])
        found[key] = found.get(key, 0) + each["bytes"]
    return {key: size for key, size in found.items() if size > SMALL}


@pytest.mark.parametrize("on", ["h100:1x8", "v5e:2x4"])
def test_parameters_are_gathered_over_fsdp_and_their_gradients_scattered(planned, on):
    found = sent(planned(on, CONFIG))
    blocks = 2 * (PARAMETERS - 2 * 4096 * 512 - 5 * 512)  # bytes of the blocks' matrices in bfloat16
    tables = 2 * 4096 * 512 * 4  # gradients of embedding and output layer, which are added up in float32
    assert ("all-reduce", ("fsdp",)) not in found, "no gradient is summed whole"
    # a TPU carries some of them out as products in windows, whose pieces go round
    windows = found.get(("collective-permute", ("fsdp",)), 0)
    assert bool(windows) == on.startswith("v5e")
    assert found["all-gather", ("fsdp",)] + windows >= 2 * blocks
    scattered = found["reduce-scatter", ("fsdp",)]
    assert tables <= scattered <= 1.01 * (blocks + tables)
    assert scattered + windows >= 0.99 * (blocks + tables)


def test_the_loss_never_copies_the_output_layer_or_its_gradient_from_one_layout_to_another(compiled):
    """XLA gathers pieces of the width as the outer dimension: a loop that holds them otherwise copies both."""
    found = []
    for _, each, _ in program.parse(compiled("v5e:2x4", CONFIG).text).walk():
        sizes = sorted(size for _, dims, _ in hlo.arrays(each.shape) for size in dims if size > 1)
        if each.opcode == "copy" and sizes == [512, 4096] and not re.search(r"\bembed\b", each.label):
            found.append(f"{each.name} {each.shape} {each.label}")
    assert found == []


def test_options_of_the_compiler_reach_it_and_parameters_are_gathered_over_a_torus_of_three_dimensions(planned):
    """Without them XLA (libtpu 0.0.42) adds the parameters up from zeros."""
    options = (
        *("xla_enable_async_all_gather=true", "xla_tpu_prefer_async_allgather_to_allreduce=true"),
        *(f"xla_tpu_enable_async_collective_fusion{more}=true" for more in ("", "_fuse_all_gather")),
    )
    cfg = dataclasses.replace(CONFIG, mesh=Mesh(data=1, fsdp=64), train=Train(xla=options))
    if jax.__version_info__ >= (0, 12):  # its libtpu (0.0.50) takes fused gathers on v5e alone
        with pytest.raises(UserError, match=r"got v5p:4x4x4, .*Continuation fusion for AllGather"):
            planned("v5p:4x4x4", cfg)
        return
    blocks = 2 * (PARAMETERS - 2 * 4096 * 512 - 5 * 512)
    gathered = sent(planned("v5p:4x4x4", cfg))["all-gather", ("fsdp",)]
    assert 2 * blocks <= gathered <= 2.2 * (blocks + 2 * 2 * 4096 * 512)


@pytest.mark.parametrize(("on", "kind"), [("h100:1x8", "float8"), ("v5e:2x4", "int8")])
def test_quantized_blocks_compute_and_gather_in_eight_bits_alone(planned, compiled, on, kind):
    cfg = dataclasses.replace(CONFIG, train=Train(quantize=kind))
    found = program.parse(compiled(on, cfg).text)
    sums = collections.Counter()
    for where, each, times in found.walk():
        for name, count, _ in products.products(found.computations, where, each):
            sums[name] += times * count
    tokens = 64 * 512
    blocks = PARAMETERS - 5 * 512 - 2 * 4096 * 512
    assert sums[kind] == 6 * tokens * blocks / 8
    assert sums[""] >= 6 * tokens * 4096 * 512 / 8, "the output layer"
    gathered = [
        sum(each["bytes"] for each in planned(on, one)["transfers"] if each["kind"] == "all-gather")
        for one in (cfg, CONFIG)
    ]
    # one byte for two, forward and backward; scales of rows and columns come on top
    assert gathered[1] - gathered[0] > 0.7 * 2 * blocks


def test_a_block_is_summed_over_tensor_twice_in_each_direction(planned):
    cfg = dataclasses.replace(CONFIG, mesh=Mesh(data=4, tensor=2))
    plan = planned("h100:1x8", cfg)
    (summed,) = [each for each in plan["transfers"] if each["axes"] == ["tensor"] or each["axes"] == ("tensor",)]
    activations = 64 * 512 * 512 * 2 / 4  # bytes of a device's residual stream
    assert summed["kind"] == "all-reduce"
    assert summed["bytes"] == pytest.approx(2 * 2 * 2 * activations, rel=0.3), "two of each block, there and back"
    assert plan["memory"]["parameters"] == 4 * (PARAMETERS - 5 * 512) / 2 + 4 * 5 * 512


def test_sums_over_tensor_of_int8_products_are_counted_as_integers_of_32_bits(planned):
    """Each product's partial sums are added up by themselves: q, k, v, gate and up backward, o and down forward."""
    cfg = dataclasses.replace(CONFIG, mesh=Mesh(data=4, tensor=2))
    plans = [planned("h100:1x8", one) for one in (cfg, dataclasses.replace(cfg, train=Train(quantize="int8")))]
    plain, quantized = (sent(plan)["all-reduce", ("tensor",)] for plan in plans)
    stream = 64 * 512 * 512 / 4  # numbers of a device's residual stream
    assert quantized - plain == pytest.approx(2 * (7 * 4 - 4 * 2) * stream, rel=0.02)


@pytest.mark.parametrize("on", ["h100:2x4", "v5e:2x2x2"])
def test_with_a_replica_on_each_node_or_slice_only_gradients_go_between_them(planned, on):
    cfg = dataclasses.replace(CONFIG, mesh=Mesh(data=2, fsdp=4))
    plan = planned(on, cfg)
    links = {tuple(each["axes"]): each["link"] for each in plan["transfers"]}
    assert links["data",] == "network"
    assert links["fsdp",] != "network"
    found = sent(plan)
    between = {key: size for key, size in found.items() if "data" in key[1]}
    assert between.keys() == {("all-reduce", ("data",))}
    cut = (PARAMETERS - 5 * 512) / 4  # a device's piece; gradients are bfloat16, but for embedding and output layer
    assert between["all-reduce", ("data",)] == pytest.approx(2 * cut + 2 * 2 * 4096 * 512 / 4, rel=0.05)
    assert plan["memory"]["parameters"] == 4 * cut + 4 * 5 * 512


IMAGES = {"task": Classification(), "data": Synthetic(batch_size=64)}
ONE_LAYER = {"vocab_size": 1024, "layers": 1, "heads": 4, "kv_heads": 2, "width": 512, "mlp_width": 512}
FAMILIES = {
    "mixture": (MixtralConfig(**ONE_LAYER, experts=8, dtype="bfloat16"), {"data": CONFIG.data}),
    "window": (
        LlamaConfig(**ONE_LAYER, window=256, dtype="bfloat16"),
        {"data": dataclasses.replace(CONFIG.data, seq_len=2048, batch_size=16)},
    ),
    "bert": (
        BERTConfig(
            vocab_size=1024, context=512, layers=1, width=512, heads=4, mlp_width=512, dropout=0.0, dtype="bfloat16"
        ),
        {"task": MaskedLM(), "data": Synthetic(seq_len=512, batch_size=64)},
    ),
    "convolutions": (ResNetConfig(input_shape=(32, 32, 3), depths=(1, 1), widths=(64, 128), dtype="bfloat16"), IMAGES),
    "gan": (GANConfig(), {"task": GAN(), "data": IMAGES["data"]}),
}
"""A model and its config's other sections; of the kernels that decide what is counted."""


@pytest.mark.parametrize(
    ("family", "on"),
    [
        *((family, "h100:1x1") for family in FAMILIES),
        ("mixture", "v5e:2x2"),
        ("window", "v5e:2x2"),
        ("bert", "v5e:2x2"),
        ("convolutions", "v5e:2x2"),
        ("mixture", "v5p:2x2x1"),
    ],
)
def test_a_program_computes_its_model_and_little_more(planned, family, on):
    model, sections = FAMILIES[family]
    plan = planned(on, Config(model=model, mesh=Mesh(), **sections))
    assert plan["uncounted"] == []
    ratio = plan["hardware_flops"] / plan["model_flops_causal"]
    # splash computes whole blocks of 512, of which a window of 256 shows a quarter or less
    assert figures.ENOUGH <= ratio <= (2.5 if family == "window" else 1.3)
    assert 0 < plan["mfu_causal"] <= plan["mfu"] <= 1
    if family in ("mixture", "window", "bert"):
        assert plan["attention"] == ["cudnn" if on.startswith("h100") else "splash"]
    assert plan["excess"] == ""
    text = figures.figures_table(CONFIG, plan)
    assert f"TFLOP/s {'float32' if family == 'gan' else 'bfloat16'}" in text
    assert "launches" in text


PAIRS = [
    *[(name, "v5e:2x2") for name in ("vae", "t5")],
    *[(name, "v5p:2x2x1") for name in ("cnn", "vgg", "gpt2")],
    *[(name, "v6e:2x2") for name in ("mlp", "vit", "lstm")],
    *[(name, "v7:2x2x1") for name in ("resnet", "clip", "transformer")],
    ("bert-classifier", "h100:1x1"),
]
"""Families of the zoo, each on one kind of hardware; the others are in `FAMILIES`."""


@pytest.mark.parametrize(("family", "on"), PAIRS)
def test_every_family_s_products_are_counted_on_every_kind_of_hardware(planned, family, on):
    task, model = ZOO[family]
    change = {name: value for name, value in (("dtype", "bfloat16"), ("dropout", 0.0)) if hasattr(model, name)}
    data = Synthetic(batch_size=64, seq_len=12)
    plan = planned(on, Config(dataclasses.replace(model, **change), task_of(task), data, mesh=Mesh()))
    assert plan["uncounted"] == []
    assert figures.ENOUGH <= plan["hardware_flops"] / plan["model_flops_causal"] <= 1.3
    assert 0 < plan["mfu_causal"] <= plan["mfu"] <= 1


def test_a_reference_kernel_under_a_short_window_is_planned_and_the_table_says_what_it_computes(planned):
    model = LlamaConfig(**ONE_LAYER, window=256, attention="xla", dtype="bfloat16")
    cfg = Config(model=model, data=dataclasses.replace(CONFIG.data, seq_len=8192, batch_size=2))
    plan = planned("h100:1x1", cfg)
    times = plan["hardware_flops"] / plan["model_flops_causal"]
    assert times > figures.MUCH
    said = f"computes {times:.1f} x the model's products"
    assert plan["excess"].startswith(said)
    assert "attention's (kernel xla)" in plan["excess"]
    assert said in figures.figures_table(cfg, plan)


@pytest.mark.parametrize("on", ["h100:1x8", "v5e:2x4"])
def test_with_sequence_sharding_a_block_s_sums_are_gathers_and_scatters(planned, on):
    cfg = dataclasses.replace(CONFIG, mesh=Mesh(data=4, tensor=2, sequence=True))
    found = sent(planned(on, cfg))
    stream = 64 * 512 * 512 * 2 / 4  # bytes of a device's rows of the residual stream, all tokens
    assert found.get(("all-reduce", ("tensor",)), 0) < 2.1 * stream, "embedding and output layer"
    # on a TPU some are products in windows, whose pieces go round
    gathered = found.get(("all-gather", ("tensor",)), 0) + found.get(("collective-permute", ("tensor",)), 0)
    scattered = found.get(("reduce-scatter", ("tensor",)), 0) + found.get(("collective-permute", ("tensor",)), 0)
    blocks = 2 * 2 * 2 * stream  # two of each block, there and back
    assert gathered >= 0.9 * blocks
    assert scattered >= 0.9 * blocks


def test_what_does_not_fit_is_told_by_the_compiler_with_what_would_make_it_fit(planned):
    cfg = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=8192))
    plan = planned("v5e:2x4", cfg)
    assert not plan["fits"]
    assert "RESOURCE_EXHAUSTED" in plan["shortage"]
    assert plan["memory"]["peak"] > plan["memory"]["device"] == 16 * 2**30
    text = figures.figures_table(cfg, plan)
    assert "IT DOES NOT FIT" in text
    assert "--model.remat full" in text


REPORTED = """
import sys
from pathlib import Path
import jax
from jaxmodels.plan import compile
analyze = jax.stages.Compiled.memory_analysis
def reporting(self):
    found = analyze(self)
    print("peak", found.peak_memory_in_bytes, found.argument_size_in_bytes + found.temp_size_in_bytes)
    return found
jax.stages.Compiled.memory_analysis = reporting
sys.exit(compile.main(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("on", ["v5e:1x1", "h100:1x1"])
def test_the_peak_is_the_compiler_s(compiled, on, monkeypatch):
    """A TPU's compiler knows what is alive at a time; a GPU is given all temporaries as one block."""
    said, run = [], subprocess.run

    def child(command, **options):
        folder = command[-1]
        said.append(run([*command[:2], "-c", REPORTED, folder], **options))
        return said[-1]

    monkeypatch.setattr(subprocess, "run", child)
    made = compiled(on, Config(MLPConfig(hidden=(64,)), **IMAGES))
    peak, total = map(int, re.search(r"peak (\d+) (\d+)", said[0].stdout).groups())
    if on.startswith("v5e"):
        assert made.peak == peak
    else:  # and the step's metrics, some numbers
        assert 0 <= made.peak - max(peak, total) < 1024
    assert made.fits and made.shortage == ""


def test_what_a_tpu_s_compiler_accepts_fits_and_what_is_too_much_for_a_gpu_does_not(compiled):
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=8 * GIB,
        temp_size_in_bytes=int(10.25 * GIB),  # not all of them alive at a time
        output_size_in_bytes=8 * GIB,
        alias_size_in_bytes=8 * GIB,
        peak_memory_in_bytes=int(13.88 * GIB),
    )
    assert hardware.needed(analysis, "tpu") == int(13.88 * GIB)
    assert hardware.needed(analysis, "cuda") == int(18.25 * GIB)
    made = compiled("h100:1x8", CONFIG)
    assert dataclasses.replace(made, peak=80 * 10**9).fits
    assert not dataclasses.replace(made, peak=86 * 10**9).fits


def test_the_command_prints_a_plan_and_writes_it(planned, root, tmp_path, capsys, monkeypatch):
    planned("h100:1x8", CONFIG)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "plan.json"
    arguments = ["--model.layers", "1", "--model.width", "256", "--model.heads", "4", "--data.batch-size", "16"]
    code = cli.main(
        ["plan", str(root / "configs" / "gpt2_openwebtext.py"), "--on", "h100:1x8", *arguments, "--json", str(out)]
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert "h100:1x8: 8 device(s), mesh data=8" in printed
    assert "it fits" in printed
    (plan,) = json.loads(out.read_text())
    assert plan["devices"] == 8
    assert plan["seconds"].keys() == {"compute", "memory", "waiting for links", "launches"}


def test_a_mistake_is_one_line_before_anything_is_compiled(root, capsys):
    config = str(root / "configs" / "gpt2_openwebtext.py")
    for arguments, told in (
        ([], "try --on h100:1x8"),
        (["--on", "H100:1x8"], "did you mean 'h100'"),
    ):
        assert cli.main(["plan", config, *arguments]) == 2
        assert told in capsys.readouterr().err
