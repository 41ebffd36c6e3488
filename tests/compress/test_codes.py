"""Coded parameters: the codes of references, products on any mesh, runs that hold bytes, and adapters beside them."""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxmodels import cli, create, load_pretrained, load_run
from jaxmodels import config as configs
from jaxmodels.commands.export import export_run
from jaxmodels.compress.codes import Spec, assemble, grid, quantize, scale_shape
from jaxmodels.compress.coding import coding
from jaxmodels.config import Checkpoint, Config, Init, LoRA, Mesh, Metrics, Quantized, Synthetic, Train
from jaxmodels.errors import UserError
from jaxmodels.models.coded import NF4, dequantize, is_coded, plain, unpack
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.parameters import Axes
from jaxmodels.plan.arithmetic import Arithmetic
from jaxmodels.plan.compile import _bytes
from jaxmodels.plan.topology import parse
from jaxmodels.train import run as runs
from jaxmodels.train.adapters import load_adapters
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.job import assemble as assemble_job
from jaxmodels.train.saved import read_run
from tests.zoo import ZOO, arrays, fill, outputs

MODEL = GPT2Config(vocab_size=64, context=16, layers=2, width=16, heads=4)
PLAIN = Config(
    model=MODEL,
    data=Synthetic(seq_len=16, batch_size=8),
    train=Train(steps=2),
    checkpoint=Checkpoint(every=1),
    metrics=Metrics(progress="none", loggers=()),
)
ONE = Axes(("layers", "embed", "mlp"), "matrix")
HEADS = Axes(("layers", "heads", "head_dim", "embed"), "matrix")
TABLE = Axes(("vocab", "embed"), "embedding")


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rounded(w, kind, group, symmetric):
    """Codes, scales and zeros of a matrix (inputs, outputs), written out for groups of its inputs."""
    inputs, outputs = w.shape
    blocks = w.reshape(-1, group or inputs, outputs)
    least, most = {"int8": (-128, 127), "int4": (-8, 7)}[kind]
    zeros = np.zeros((len(blocks), outputs), np.float32)
    if symmetric:
        scales = np.abs(blocks).max(1) * np.float32(1 / most)
    else:
        low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)
        scales = (high - low) * np.float32(1 / (most - least))
        zeros = np.clip(np.rint(least - low / scales), least, most)
    codes = np.clip(np.rint(blocks / scales[:, None]) + zeros[:, None], least, most)
    return codes.reshape(w.shape), scales, zeros


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_are_those_of_round_to_nearest(kind, group, symmetric):
    w = drawn(2, 16, 6)
    leaf = quantize(w, ONE, Spec(kind, group, symmetric))
    assert leaf.shape == w.shape
    for i in range(2):
        codes, scales, zeros = rounded(w[i], kind, group, symmetric)
        np.testing.assert_array_equal(unpack(leaf)[i], codes)
        np.testing.assert_array_equal(leaf.scales[i], scales)
        if not symmetric:
            np.testing.assert_array_equal(leaf.zeros[i], zeros)
        expected = np.repeat(scales, group or 16, 0) * (codes - np.repeat(zeros, group or 16, 0))
        np.testing.assert_allclose(dequantize(leaf)[i], expected, rtol=1e-6)
        assert np.abs(w[i] - expected).max() <= scales.max() * (0.5 if symmetric else 1.0) + 1e-6


def test_nf4_has_the_values_and_the_rule_of_its_paper():
    """Quantiles of the normal distribution, 8 of them above 0 and 7 below, divided by the largest; a number takes the
    nearest, and one in the middle of two the lower, as bitsandbytes' comparisons do."""
    above = stats.norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    values = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(NF4, values / values.max(), atol=2e-7)

    w = drawn(1, 64, 8)
    leaf = quantize(w, ONE, Spec("nf4", 32))
    scales = np.abs(w.reshape(2, 32, 8)).max(1)
    ratio = w.reshape(2, 32, 8) / scales[:, None]
    codes = np.abs(ratio[..., None] - NF4).argmin(-1)
    np.testing.assert_array_equal(unpack(leaf).reshape(codes.shape), codes)
    np.testing.assert_array_equal(leaf.scales[0], scales)
    np.testing.assert_allclose(dequantize(leaf).reshape(codes.shape), NF4[codes] * scales[:, None], rtol=1e-6)
    middle = np.array([1.0, *((NF4[1:] + NF4[:-1]) / 2)], np.float32).reshape(1, 16, 1)
    np.testing.assert_array_equal(unpack(quantize(middle, ONE, Spec("nf4"))).ravel(), [15, *range(15)])
    # thresholds as bitsandbytes' kernel writes them
    for written in (0.03979014977812767, 0.1202552504837513, 0.8614784181118011, -0.8480964004993439):
        assert np.float32(written) in middle


def test_float8_is_a_cast_of_the_scaled_numbers():
    w = drawn(1, 8, 4)
    leaf = quantize(w, ONE, Spec("float8"))
    scales = np.abs(w).max(1, keepdims=True) * np.float32(1 / 448)
    codes = (w / scales).astype(jnp.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(leaf.codes).view(np.uint8), codes.view(np.uint8))
    np.testing.assert_array_equal(dequantize(leaf), codes.astype(np.float32) * scales)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "float8"])
def test_groups_of_zeros_stay_zeros_and_nan_stays_seen(kind):
    w = drawn(1, 8, 4)
    w[:, :, 1], w[:, 0, 2] = 0, np.nan
    back = np.asarray(dequantize(quantize(w, ONE, Spec(kind))))
    assert not back[:, :, 1].any() and np.isnan(back[:, :, 2]).all() and np.isfinite(back[:, :, 3]).all()


@pytest.mark.parametrize(
    ("shape", "names", "group", "expected"),
    [
        ((3, 4, 8, 5), HEADS, None, (3, 1, 1, 5)),
        ((3, 4, 8, 5), HEADS, 4, (3, 4, 2, 5)),
        ((3, 4, 8, 5), HEADS, 16, (3, 2, 1, 5)),
        ((10, 8), TABLE, 4, (10, 2)),
        ((10, 8), TABLE, None, (10, 1)),
        ((3, 3, 8, 6), Axes(("window", "window", "channels_in", "channels_out"), "matrix"), 24, (3, 1, 1, 6)),
        ((2, 4, 8, 6), Axes(("layers", "expert", "embed", "mlp"), "matrix"), 4, (2, 4, 2, 6)),
    ],
)
def test_groups_follow_the_inputs_of_an_output(shape, names, group, expected):
    assert scale_shape(shape, names, Spec("int8", group)) == expected
    w, leaf = drawn(*shape), quantize(drawn(*shape), names, Spec("int8", group))
    assert leaf.shape == shape
    assert np.abs(dequantize(leaf) - w).max() <= float(leaf.scales.max()) / 2 + 1e-6


def test_groups_through_heads_are_those_of_flat_inputs():
    w = drawn(2, 4, 8, 6)
    leaf = quantize(w, HEADS, Spec("int4", 16, symmetric=False))
    flat = quantize(w.reshape(2, 32, 6), ONE, Spec("int4", 16, symmetric=False))
    np.testing.assert_array_equal(unpack(leaf).reshape(2, 32, 6), unpack(flat))
    np.testing.assert_array_equal(dequantize(leaf).reshape(2, 32, 6), dequantize(flat))


def test_codes_chosen_elsewhere_are_assembled():
    w, spec = drawn(1, 16, 4), Spec("int4", 8, symmetric=False)
    scales, zeros = grid(w, ONE, spec)
    codes = np.random.default_rng(1).integers(-8, 8, w.shape)
    leaf = assemble(codes, scales, zeros, ONE, spec)
    np.testing.assert_array_equal(unpack(leaf), codes)
    assert leaf.codes.nbytes == codes.size // 2
    with pytest.raises(UserError, match="got scales of shape"):
        assemble(codes, scales, None, ONE, spec)


EVERY = {"embeddings": ("*",)}


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("gpt2", Quantized(codes="int4", group=4, symmetric=False, **EVERY)),
        ("qwen", Quantized(codes="nf4", group=8, **EVERY)),
        ("mixtral", Quantized(codes="int4")),
        ("lstm", Quantized(codes="int8", **EVERY)),
        ("t5", Quantized(codes="float8", **EVERY)),
        ("resnet", Quantized(codes="int8", symmetric=False)),
        ("vae-conv", Quantized(codes="int8")),
    ],
)
def test_a_model_with_codes_computes_what_the_dequantized_one_does(name, section):
    model = create(ZOO[name][1])
    held = coding(section, {"model": model})

    @jax.jit
    def both(params):
        params = held.encode({"model": params})["model"]
        return params, *(
            jax.tree.leaves(outputs(model, each, model.stats() or None)) for each in (params, plain(params))
        )

    params, found, expected = both(arrays(model))
    leaves = [leaf for leaf in jax.tree.leaves(params, is_leaf=is_coded) if is_coded(leaf)]
    assert len(leaves) == len(held.chosen) and {leaf.kind for leaf in leaves} == {section.codes}
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


def compressed(base, section, run):
    """A run with the parameters of another as codes, rounded to nearest."""
    opened = read_run(base)
    held = coding(section, opened.networks)
    run.mkdir()
    configs.save(replace(opened.config, compress=section), run / "config.json", {})
    (run / "checkpoints").mkdir()
    checkpointer = Checkpointer(run / "checkpoints")
    checkpointer.save(opened.step, {"params": held.encode(opened.params)}, dict(opened.meta))
    checkpointer.wait()
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = tmp_path_factory.mktemp("codes") / "base"
    runs.train(PLAIN, run)
    return run


FOUR = Quantized(codes="int4", group=8, symmetric=False)


@pytest.fixture(scope="module")
def run(base):
    return compressed(base, FOUR, base.with_name("int4"))


def test_a_run_with_codes_opens_as_such(run, base):
    opened, before = load_run(run), load_run(base)
    leaf = opened.params["model"]["layers"]["mlp"]["up"]["w"]
    assert is_coded(leaf) and leaf.codes.dtype == jnp.uint8 and leaf.codes.shape == (2, 8, 64)
    expected = coding(FOUR, before.networks).encode(before.params)
    jax.tree.map(np.testing.assert_array_equal, opened.params, expected)
    tree = json.loads((run / "checkpoints" / "2" / "manifest.json").read_text())["tree"]
    assert tree["params/model/layers/mlp/up/w/codes"] == "uint8[2,8,64]"
    assert tree["params/model/layers/mlp/up/w/zeros"] == "int8[2,2,64]"
    measured = opened.evaluation().measure()["loss"]
    assert measured == pytest.approx(before.evaluation().measure()["loss"], rel=0.05)


def test_every_command_takes_a_run_with_codes(run, tmp_path, capsys):
    assert cli.main(["eval", str(run)]) == 0
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "hf")]) == 0
    assert cli.main(["config", "explain", str(run), "compress.group"]) == 0
    assert "compress.group" in capsys.readouterr().out
    with pytest.raises(UserError, match="try --adapter lora, or --compress none"):
        assemble_job(read_run(run).config, opened=False)
    _, params = load_pretrained(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, params, plain(load_run(run).params["model"]))


def adapted(base, section=FOUR, **fields):
    adapter = LoRA(rank=2, targets=("*/attn/*", "*/mlp/*", "embed"), full=("norm/*",))
    return replace(PLAIN, init=Init(source=str(base)), adapter=adapter, compress=section, **fields)


def test_an_adapter_of_codes_equals_one_of_what_they_stand_for(base, tmp_path):
    """Its base is read from the source and coded; factors alone have gradients and moments."""
    runs.train(adapted(base), tmp_path / "qlora")
    tree = json.loads((tmp_path / "qlora" / "checkpoints" / "2" / "manifest.json").read_text())["tree"]
    assert not any("codes" in name for name in tree)
    found = load_run(tmp_path / "qlora")
    assert is_coded(found.params["model"]["layers"]["mlp"]["up"]["w"].base)
    assert found.evaluation().measure()["loss"] == pytest.approx(found.metrics[-1]["eval/loss"], rel=1e-5)
    # and where several adapters share a base, it is coded as theirs was
    shared = load_adapters(base, {"one": tmp_path / "qlora"})
    jax.tree.map(np.testing.assert_array_equal, shared.params("one"), found.params["model"])
    jax.tree.map(np.testing.assert_array_equal, shared.merged("one"), found.numbers().params["model"])
    with pytest.raises(UserError, match="an adapted run, which is merged into numbers, expected one with a section"):
        export_run(tmp_path / "qlora", tmp_path / "out", format="compressed-tensors")


def stepped(section, mesh, devices, held=False):
    """What a step of an adapter beside codes gives, or with `held` one beside what they stand for."""
    cfg = replace(adapted("", section), init=Init(), mesh=mesh, model=replace(MODEL, remat="full"))
    job = assemble_job(cfg, jax.devices()[:devices], opened=False)
    codes = job.adapter.coding.encode({"model": arrays(create(cfg.model))})
    frozen, trained = job.adapter.divide(codes, jax.random.key(1))
    shake = np.random.default_rng(2)
    trained = jax.tree.map(lambda x: x + 0.3 * shake.normal(size=x.shape).astype(np.float32), trained)
    if held:
        job = assemble_job(replace(cfg, compress=None), jax.devices()[:devices], opened=False)
        frozen = plain(frozen)
    now = replace(jax.jit(job.init)(jax.random.key(0)), params=trained, frozen=frozen)
    now = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), now, job.layout)
    batch = jax.device_put(fill(job.task.batch_spec(8)), job.task.shardings(job.mesh, job.batch))
    now, metrics = job.step()(now, batch)
    assert sum(leaf.size for leaf in jax.tree.leaves(now.opt_state) if leaf.ndim) == 2 * job.trained()
    return jax.device_get(now.params), float(metrics["loss"]), float(metrics["grad_norm"])


def test_a_step_beside_codes_equals_one_beside_numbers_on_any_mesh():
    section = replace(FOUR, embeddings=("embed",))
    (one, *measured), *others = (
        stepped(section, mesh, devices, held)
        for mesh, devices, held in (
            (Mesh(), 1, True), (Mesh(), 1, False), (Mesh(data=2, fsdp=2, tensor=2), 8, False),
        )
    )  # fmt: skip
    for params, *found in others:
        assert found == pytest.approx(measured, rel=1e-4)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), one, params)


def test_a_base_is_coded_as_its_tensors_come(base, tmp_path):
    """From published weights it is the base that is read from the run, and so has its hash."""
    assert cli.main(["export", str(base), str(tmp_path / "hf")]) == 0
    states = [
        runs.beginning.initial(assemble_job(adapted(source), opened=False)).frozen for source in (base, tmp_path / "hf")
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert len({runs.bases.fingerprint(frozen) for frozen in states}) == 1
    expected = coding(FOUR, {"model": create(MODEL)}).encode(read_run(base).params)
    jax.tree.map(
        np.testing.assert_array_equal, states[0]["model"]["layers"]["attn"], expected["model"]["layers"]["attn"]
    )


def test_a_plan_counts_a_coded_base_to_the_byte(base):
    job = assemble_job(adapted(base, Quantized(codes="nf4", group=8)), opened=False)
    held = jax.tree.leaves(runs.beginning.initial(job).frozen)
    assert _bytes(job.layout.frozen) == sum(x.nbytes for x in held)
    whole = assemble_job(replace(job.config, compress=None), opened=False)
    assert job.parameters() == whole.parameters() and job.flops() == whole.flops()
    # and a search guesses as much, or it would drop meshes that fit
    kept = Arithmetic(job.config, parse("h200:1x1")).guess(replace(job.config, mesh=Mesh())).kept
    own = [job.layout.frozen, job.layout.params, job.layout.params, job.layout.opt_state]
    assert kept == pytest.approx(sum(map(_bytes, own)), rel=0.01)
    # a code of 4 bits, and 32 bits for 8 of them: a quarter of float32
    matrices = sum(leaf.size for leaf in jax.tree.leaves(job.layout.frozen, is_leaf=is_coded) if is_coded(leaf))
    assert _bytes(whole.layout.frozen) - _bytes(job.layout.frozen) == 3 * matrices


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"targets": ("layers/attention/*",)}, "compress.targets 'layers/attention/*', which matches no parameter"),
        ({"targets": ("embed",)}, "compress.targets 'embed', which matches no matrix, expected some of layers/attn"),
        ({"embeddings": ("layers/*",)}, "matches no embedding, expected some of embed, positions"),
        ({"kept": ("head",)}, "compress.kept 'head', which matches no parameter"),
        ({"group": 6}, "got groups of 6 for layers/attn/k/w of shape (2, 16, 4, 4) with 16 inputs"),
        ({"codes": "nf4", "symmetric": False}, "compress.symmetric False for nf4"),
        ({"codes": "int3"}, "expected one of int8, int4, float8, nf4"),
    ],
)
def test_codes_that_do_not_fit_are_refused_before_work(fields, said, base):
    with pytest.raises(UserError) as refused:
        assemble_job(adapted(base, Quantized(**fields)), opened=False)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_mesh_that_would_cut_a_group_is_refused(base):
    section = Quantized(codes="int4", group=8)  # of two heads of 4
    cfg = replace(adapted(base, section), mesh=Mesh(tensor=4, data=2))
    with pytest.raises(UserError, match=r"attn/o/w/\w+ with dimension heads=2, expected a multiple of .*tensor=4"):
        assemble_job(cfg, opened=False)


def test_a_step_holds_the_numbers_of_few_layers_at_once():
    """The backward pass dequantizes codes again: kept for it, the numbers of all layers would be 3 MB here."""
    model = GPT2Config(vocab_size=64, context=16, layers=16, width=64, heads=4, attention="xla")
    cfg = replace(adapted("", Quantized(codes="int4", group=16)), init=Init(), model=model)
    cfg = replace(cfg, data=Synthetic(seq_len=8, batch_size=1))
    job = assemble_job(cfg, jax.devices()[:1], opened=False)
    leaves = jax.tree.leaves(job.layout.frozen, is_leaf=is_coded)
    numbers = 4 * sum(leaf.size for leaf in leaves if is_coded(leaf))
    used = job.lower().compile().memory_analysis()
    assert used.temp_size_in_bytes < numbers / 2
