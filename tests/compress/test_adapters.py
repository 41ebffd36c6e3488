"""LoRA and DoRA: one rule of what an adapted parameter is, runs that hold factors alone, and what is refused."""

import collections
import functools
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from jaxmodels import cli, create, load_run
from jaxmodels import config as configs
from jaxmodels.commands.options import NoOptions, configured
from jaxmodels.compress.adapters import adaptation
from jaxmodels.config import Checkpoint, Classification, Config, DoRA, Eval, Init, LoRA, Mesh, Metrics, Synthetic, Train
from jaxmodels.errors import UserError
from jaxmodels.models.adapted import Factors, join, merge, unmerge
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.train import run as runs
from jaxmodels.train import step
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.job import assemble
from jaxmodels.train.saved import read_run
from tests.zoo import ZOO, arrays, fill, outputs

MODEL = GPT2Config(vocab_size=64, context=16, layers=2, width=16, heads=4)
EVERYWHERE = ("*/attn/*", "*/mlp/*", "embed")
PLAIN = Config(
    model=MODEL,
    data=Synthetic(seq_len=16, batch_size=8),
    train=Train(steps=2),
    checkpoint=Checkpoint(every=1),
    metrics=Metrics(progress="none", loggers=()),
)


def drawn(adapter, params, seed=0):
    """Frozen parameters, and trained ones whose factors and magnitudes have an effect."""
    rng = np.random.default_rng(seed)
    frozen, trained = adapter.divide(params, jax.random.key(seed))

    def one(name, factors):
        a, b = (jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32) for x in (factors.a, factors.b))
        length = factors.magnitude
        length = None if length is None else length * jnp.asarray(rng.uniform(0.5, 1.5, length.shape), jnp.float32)
        return Factors(a, b, length, factors.scale)

    return frozen, adapter.mapped(one, trained)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("gpt2", LoRA(rank=3, targets=("*",))),
        ("gpt2", DoRA(rank=3, targets=EVERYWHERE[:2])),
        ("qwen", LoRA(rank=2, targets=("*",), ranks=("*/mlp/*=4",), alphas=("*/attn/*=3",), stabilized=True)),
        ("mixtral", LoRA(rank=2, targets=("layers/*",))),
        ("lstm", LoRA(rank=2, targets=("*",))),
        ("t5", DoRA(rank=2, targets=("encoder/layers/*", "decoder/layers/*"))),
        ("vit", LoRA(rank=2, targets=("layers/*", "patches", "positions", "head"))),
        ("resnet", LoRA(rank=2, targets=("*",))),
        ("cnn", DoRA(rank=2, targets=("*",))),
        ("vae-conv", LoRA(rank=1, targets=("*",))),
    ],
)
def test_a_model_with_factors_computes_what_the_merged_one_does(name, section):
    model = create(ZOO[name][1])
    adapter = adaptation(section, {"model": model}, ["model"])
    assert all(each.rank for each in adapter.chosen.values())
    frozen, trained = drawn(adapter, {"model": arrays(model)})
    params = join(frozen, trained)["model"]
    whole = merge(params, model.axes())
    stats = model.stats() or None
    found, expected = (jax.tree.leaves(outputs(model, each, stats)) for each in (params, whole))
    base = jax.tree.leaves(outputs(model, frozen["model"], stats))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 * float(jnp.abs(b).max()))
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(found, base, strict=True)) > 1e-2


def test_the_rule_is_written_out_for_one_matrix():
    """w = base + alpha / r · a · b, with a square matrix, whose factors could be taken the wrong way round."""
    section = LoRA(rank=2, alpha=6, targets=("layers/attn/q", "layers/attn/o"))
    model = create(MODEL)
    adapter = adaptation(section, {"model": model}, ["model"])
    params = {"model": arrays(model)}
    frozen, trained = drawn(adapter, params)
    whole = merge(join(frozen, trained)["model"], model.axes())
    for name, (ins, outs) in {"q": ("dr", "rhk"), "o": ("hkr", "rd")}.items():
        factors = trained["model"]["layers"]["attn"][name]["w"]
        equation = f"l{ins},l{outs}->l{(ins + outs).replace('r', '')}"
        expected = params["model"]["layers"]["attn"][name]["w"] + 3 * np.einsum(equation, factors.a, factors.b)
        np.testing.assert_allclose(whole["layers"]["attn"][name]["w"], expected, atol=1e-5)
    assert whole["layers"]["attn"]["v"]["w"] is params["model"]["layers"]["attn"]["v"]["w"]
    back = unmerge(whole, trained["model"], model.axes())
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), back, params["model"])


def test_factors_of_an_output_layer_start_as_those_of_a_matrix():
    """Its b multiplies the features first, so that it is as small as a matrix's a."""
    model = create("llama", vocab_size=64, context=16, layers=1, width=16, heads=2, kv_heads=2)
    adapter = adaptation(LoRA(rank=4, targets=("embed", "head")), {"model": model}, ["model"])
    _, trained = adapter.divide({"model": arrays(model)}, jax.random.key(0))
    table, output = trained["model"]["embed"]["w"], trained["model"]["head"]["w"]
    assert not np.any(output.a) and 0.2 < np.abs(output.b).max() <= 16**-0.5
    assert not np.any(table.a) and np.abs(table.b).max() > 1


def test_an_output_without_weights_stays_finite_under_dora():
    model = create("gpt2", vocab_size=64, context=16, layers=1, width=16, heads=4)
    params = jax.tree.map(jnp.asarray, arrays(model))
    params["layers"]["mlp"]["up"]["w"] = params["layers"]["mlp"]["up"]["w"].at[..., 0].set(0)
    adapter = adaptation(DoRA(rank=2, targets=("*/mlp/up",)), {"model": model}, ["model"])
    joined = join(*adapter.divide({"model": params}, jax.random.key(0)))["model"]
    tokens = jnp.arange(8)[None]
    logits = jax.jit(model.apply)
    np.testing.assert_allclose(logits(joined, tokens), logits(params, tokens), atol=1e-5)
    np.testing.assert_allclose(logits(merge(joined, model.axes()), tokens), logits(params, tokens), atol=1e-5)


def test_scales_follow_patterns():
    section = LoRA(rank=4, alpha=8, ranks=("*/mlp/*=16",), alphas=("*/up=32", "*/q/w=1"))
    assert section.scale_of("layers/attn/k/w") == 2
    assert section.scale_of("layers/attn/q/w") == 0.25
    assert (section.rank_of("layers/mlp/up/w"), section.scale_of("layers/mlp/up/w")) == (16, 2)
    assert replace(section, stabilized=True).scale_of("layers/mlp/up/w") == 8


def needed(cfg):
    """The job of a config, and the shapes of the products that its step needs."""
    job = assemble(cfg, opened=False)
    advance = functools.partial(step.advance, job.task, job.optimizers, accumulate=1, ema=None)
    with jax.set_mesh(job.mesh):
        jaxpr = jax.make_jaxpr(advance)(job.layout, job.batch).jaxpr
    kept, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return job, collections.Counter(products_of(kept))


def products_of(jaxpr):
    """Shapes of the products in a jaxpr and in those inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape
        inner = jax.tree.leaves([*eqn.params.values()], is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
        for each in (getattr(each, "jaxpr", each) for each in inner):
            if hasattr(each, "eqns"):
                yield from products_of(each)


@pytest.mark.parametrize("section", [LoRA(rank=2, targets=EVERYWHERE[:2]), DoRA(rank=2, targets=EVERYWHERE[:2])])
def test_no_gradient_of_the_shape_of_a_weight_is_computed(section):
    weights = {(16, 64), (64, 16), (16, 4, 4)}  # of one layer, as its gradient would be
    assert weights <= needed(PLAIN)[1].keys()
    job, products = needed(replace(PLAIN, adapter=section))
    # a · b, once for each matrix whose outputs have lengths, and no gradient beside it
    expected = {(16, 64): 1, (64, 16): 1} if section.magnitudes else {}
    assert {shape: count for shape, count in products.items() if shape in weights} == expected
    moments = [leaf for leaf in jax.tree.leaves(job.layout.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * job.trained()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = tmp_path_factory.mktemp("adapters") / "base"
    runs.train(PLAIN, run)
    return run


def adapted(base, **fields):
    return replace(PLAIN, init=Init(source=str(base)), adapter=LoRA(rank=2, targets=EVERYWHERE), **fields)


@pytest.fixture(scope="module")
def run(base):
    run = base.with_name("adapted")
    runs.train(adapted(base, train=Train(steps=4)), run)
    return run


def test_a_checkpoint_holds_the_factors_and_names_their_base(run, base):
    tree = json.loads((run / "checkpoints" / "4" / "manifest.json").read_text())["tree"]
    assert {name.split("/")[0] for name in tree} == {"step", "params", "opt_state", "rng"}
    assert all(name.endswith(("/a", "/b")) for name in tree if name.startswith("params/"))
    meta = json.loads((run / "checkpoints" / "4" / "meta.json").read_text())
    assert meta["base"]["source"] == str(base) and len(meta["base"]["hash"]) == 32
    log = (run / "log.txt").read_text()
    job = assemble(adapted(base), opened=False)
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(job.layout.frozen))
    assert f"{job.trained():,} of {job.parameters():,} trained" in log and f"base {size:,}, trained" in log


def test_a_resumed_run_has_the_same_bits(run, base, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "4")
    assert (again / "checkpoints" / "3").is_dir()
    runs.train(adapted(base, train=Train(steps=4)), again)
    trees = [Checkpointer(each / "checkpoints").restore_params(4)[0] for each in (run, again)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_run_is_read_as_an_ordinary_one(run, base):
    opened, before = load_run(run), load_run(base)
    assert jax.tree.structure(opened.params) == jax.tree.structure(before.params)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), opened.params, before.params)["model"]
    assert moved["layers"]["attn"]["q"]["w"] > 0 and moved["embed"]["w"] > 0
    assert moved["norm"]["scale"] == moved["positions"]["w"] == 0
    found, rows = opened.evaluation().measure(), opened.metrics
    assert found["loss"] == pytest.approx(rows[-1]["eval/loss"], rel=1e-5)


def test_every_command_takes_an_adapted_run(run, tmp_path, capsys):
    assert cli.main(["eval", str(run)]) == 0
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "hf")]) == 0
    assert cli.main(["config", "explain", str(run), "adapter.rank"]) == 0
    assert "adapter.rank" in capsys.readouterr().out
    # and a run may begin with the merged parameters of an adapted one
    runs.train(replace(PLAIN, init=Init(source=str(run)), train=Train(steps=1)), tmp_path / "next")
    assert load_run(tmp_path / "next").step == 1


def test_another_base_is_refused_by_its_hash(run, base, tmp_path):
    other = tmp_path / "other"
    runs.train(replace(PLAIN, train=Train(steps=2, seed=1)), other)
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    cfg = adapted(other, train=Train(steps=5))
    with pytest.raises(UserError, match=r"got .*other with weights of the hash .*, expected .* try the base"):
        runs.train(cfg, moved, "must")
    # what has only been moved is the same base
    shutil.copytree(base, tmp_path / "copy")
    runs.train(adapted(tmp_path / "copy", train=Train(steps=5)), moved, "must")
    assert read_run(moved).step == 5


def test_a_random_base_is_kept_in_its_run(tmp_path):
    cfg = replace(PLAIN, adapter=LoRA(rank=2))
    runs.train(cfg, tmp_path / "run")
    opened = load_run(tmp_path / "run")
    first = jax.jit(assemble(cfg, opened=False).init)(jax.random.key(0)).frozen
    np.testing.assert_array_equal(opened.params["model"]["positions"]["w"], first["model"]["positions"]["w"])


def test_batch_statistics_come_with_the_factors_that_they_were_made_with(tmp_path):
    model = ZOO["vgg-bn"][1]
    section = LoRA(rank=1, targets=("head",))
    cfg = replace(PLAIN, model=model, task=Classification(), data=Synthetic(batch_size=8), adapter=section)
    runs.train(replace(cfg, train=Train(steps=1), eval=Eval(every=0)), tmp_path / "run")
    further = replace(cfg, adapter=replace(section, source=str(tmp_path / "run")))
    state = runs.beginning.initial(assemble(further, opened=False))
    own, fresh = load_run(tmp_path / "run").stats, jax.tree.leaves(create(model).stats())
    found = jax.tree.leaves(state.stats)
    for ours, theirs in zip(found, jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert any(np.any(ours != before) for ours, before in zip(found, fresh, strict=True))


@pytest.mark.parametrize("section", [LoRA(rank=2, targets=EVERYWHERE), DoRA(rank=4, targets=("*/attn/*", "*/mlp/*"))])
def test_a_step_on_eight_devices_equals_one_device(section):
    cfg = replace(PLAIN, adapter=section, model=replace(MODEL, remat="full"))
    found = []
    for mesh, devices in ((Mesh(), 1), (Mesh(data=2, fsdp=2, tensor=2), 8)):
        job = assemble(replace(cfg, mesh=mesh), jax.devices()[:devices], opened=False)
        params = {"model": arrays(create(cfg.model))}
        frozen, trained = drawn(job.adapter, params)
        made = jax.jit(job.init)(jax.random.key(0))
        now = replace(made, params=trained, frozen=frozen)
        now = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), now, job.layout)
        batch = jax.device_put(fill(job.task.batch_spec(8)), job.task.shardings(job.mesh, job.batch))
        now, metrics = job.step()(now, batch)
        found.append((jax.device_get(now.params), float(metrics["loss"]), float(metrics["grad_norm"])))
    (one, *measured), (eight, *others) = found
    assert measured == pytest.approx(others, rel=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), one, eight)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"targets": ("layers/attention/*",)},
            "targets 'layers/attention/*', which matches no parameter, expected some of",
        ),
        ({"targets": ("norm/*",)}, "targets 'norm/*', which matches no matrix or embedding"),
        ({"targets": ()}, "without a pattern"),
        ({"targets": ("embed",), "full": ("embed*",)}, "targets embed, all of which adapter.full trains themselves"),
        ({"full": ("head/*",)}, "full 'head/*', which matches no parameter"),
        ({"rank": 17}, "rank 17 for layers/attn/k/w, a matrix of rank 16 at most"),
        ({"ranks": ("*/mlp/*=4",)}, "ranks '*/mlp/*', which matches no target"),
        ({"ranks": ("*=0",)}, "ranks '*=0', expected PATTERN=N"),
        ({"alphas": ("*=-1",)}, "alphas '*=-1', expected PATTERN=NUMBER"),
        ({"rank": 0}, "rank 0, expected at least 1"),
        ({"alpha": 0.0}, "alpha 0.0, expected above 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(fields, said):
    with pytest.raises(UserError) as refused:
        assemble(replace(PLAIN, adapter=LoRA(**fields)), opened=False)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_what_starts_at_random_is_trained(base):
    cfg = replace(adapted(base), init=Init(source=str(base), fresh=("norm/*",)))
    with pytest.raises(UserError, match=r"fresh 'norm/\*', by which norm/.* try --adapter.full 'norm/\*'"):
        runs.beginning.initial(assemble(cfg, opened=False))


def test_an_adapter_is_chosen_on_the_command_line(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from jaxmodels.config import Config\nfrom jaxmodels.models.gpt2 import GPT2Config\n"
        "def get_config():\n    return Config(model=GPT2Config())\n"
    )
    argv = [str(file), "--adapter", "lora", "--adapter.rank", "4", "--adapter.targets", "*/mlp/*", "embed"]
    cfg, _ = configured(argv, "jaxmodels train", NoOptions)
    assert cfg.adapter == LoRA(rank=4, targets=("*/mlp/*", "embed"))
    assert configs.from_json(json.loads(json.dumps(configs.to_json(cfg)))) == cfg
    plain, _ = configured([str(file)], "jaxmodels train", NoOptions)
    assert plain.adapter is None and configs.to_json(plain)["adapter"] is None
    assert configs.from_json({k: v for k, v in configs.to_json(plain).items() if k != "adapter"}) == plain
    assert configs.replaced(cfg, "adapter", "none").adapter is None
    assert configs.differences(plain, cfg)["adapter"] == (None, "lora")
    for extra, said in (
        (["--adapter.rank", "4"], "got --adapter.rank without --adapter, expected a kind of it, one of lora, dora"),
        (["--adapter", "lara"], "got adapter 'lara', expected one of lora, dora, or package.module:Name"),
        (["--help", "adapter"], "try --adapter lora --help adapter"),
    ):
        with pytest.raises(UserError, match=said.replace("?", r"\?")):
            configured([str(file), *extra], "jaxmodels train", NoOptions)
