"""A teacher's outputs and inner states as losses, runs that hold the student alone, and what is refused."""

import functools
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import cli, create, load_run, tasks
from jaxmodels import config as configs
from jaxmodels.commands.options import NoOptions, configured
from jaxmodels.compress.distillation import Teaching, pairs
from jaxmodels.config import (
    GAN,
    CausalLM,
    Checkpoint,
    Classification,
    Config,
    Distill,
    Init,
    LoRA,
    MaskedLM,
    Mesh,
    Metrics,
    Seq2Seq,
    Synthetic,
    Train,
)
from jaxmodels.data.contract import IGNORED
from jaxmodels.errors import UserError
from jaxmodels.models.attention import recording
from jaxmodels.models.bert import BERTConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.tasks import flops, losses
from jaxmodels.train import bases
from jaxmodels.train import run as runs
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.job import assemble
from tests.zoo import ZOO, arrays, fill

TEACHER = GPT2Config(vocab_size=64, context=16, layers=4, width=16, heads=4)
MODEL = replace(TEACHER, layers=2, dropout=0.0)
PLAIN = Config(
    model=TEACHER,
    data=Synthetic(seq_len=16, batch_size=8),
    train=Train(steps=2),
    checkpoint=Checkpoint(every=1),
    metrics=Metrics(progress="none", loggers=()),
)
ALL = {"alpha": 0.7, "temperature": 3.0, "hidden": 0.5, "attention": 0.25, "relations": 2.0}
BERT = BERTConfig(vocab_size=40, context=8, layers=4, heads=2, width=8, mlp_width=16, dropout=0.0)
rng = np.random.default_rng(0)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def test_blocks_are_paired_by_their_depth():
    assert pairs(2, 4).tolist() == [1, 3] and pairs(6, 12).tolist() == [1, 3, 5, 7, 9, 11]
    assert pairs(3, 3).tolist() == [0, 1, 2] and pairs(2, 5).tolist() == [1, 4]


@pytest.mark.parametrize(("name", "remat"), [("bert", "none"), ("llama", "full"), ("vit", "none")])
def test_inner_states_are_those_of_shorter_stacks_and_of_recorded_attention(name, remat):
    model = create(replace(ZOO[name][1], remat=remat))
    params, inputs = jax.tree.map(jnp.asarray, arrays(model)), fill({"x": model.inputs(2)[0]})["x"]
    out, inner = model.apply(params, inputs, keep=True)
    np.testing.assert_array_equal(out, model.apply(params, inputs))
    L, B, T, _ = inner["layers"]["hidden"].shape
    with recording() as weights:
        jax.block_until_ready(create(ZOO[name][1]).apply(params, inputs))
    scores = np.asarray(inner["layers"]["attn"]["scores"])
    np.testing.assert_allclose(np.stack(weights), softmax(scores), atol=1e-5)
    if name == "bert":  # which has no norm behind its stack
        for depth in range(1, L + 1):
            short = create(replace(model.config, layers=depth))
            cut = {**params, "layers": jax.tree.map(lambda x, depth=depth: x[:depth], params["layers"])}
            found = short.apply(cut, inputs, head=False)
            np.testing.assert_allclose(inner["layers"]["hidden"][depth - 1], found, atol=1e-5)
    values = inner["layers"]["attn"]["values"]
    assert values.shape[:3] == (L, B, T) and float(jnp.abs(values).max()) > 0


@functools.cache
def bert_case():
    """A student and a teacher with their parameters, and a batch with padding and a row that does not count."""
    config = replace(BERT, head="classification", classes=3)
    student, teacher = create(replace(config, layers=2)), create(config)
    params = {
        "model": arrays(student),
        "teacher": {"params": jax.tree.map(lambda x: 1.5 * x, arrays(teacher)), "stats": {}},
    }
    segments = np.array([[1] * 8, [1] * 5 + [0] * 3, [1] * 2 + [0] * 6, [1] * 8], np.int32)
    batch = {"inputs": rng.integers(0, 40, (4, 8)).astype(np.int32), "segment_ids": segments}
    batch |= {"labels": np.array([0, 2, 1, 1], np.int32), "weight": np.array([1, 1, 1, 0], np.float32)}
    return config, student, teacher, jax.tree.map(jnp.asarray, params), batch


def taught(section, config, student, kind=Classification()):  # noqa: B008
    task = tasks.build(kind, student.config, Synthetic(seq_len=8))
    return Teaching.of(section, config).taught(task)


def test_each_part_of_the_loss_equals_a_reference_written_out_by_loops():
    config, student, teacher, params, batch = bert_case()
    section = Distill(teacher="it", **ALL)
    task = taught(section, config, student)
    assert {*task.networks} == {"model"} and task.teacher is not None
    total, aux = jax.jit(task.losses[0].fn)(params, {}, batch, jax.random.key(0))
    given = batch["inputs"], {"segment_ids": batch["segment_ids"], "keep": True}
    z, mine = jax.device_get(student.apply(params["model"], given[0], **given[1]))
    v, theirs = jax.device_get(teacher.apply(params["teacher"]["params"], given[0], **given[1]))
    a, b, T = mine["layers"], theirs["layers"], section.temperature
    expected = dict.fromkeys(("hard", "soft", "hidden", "attention", "relations"), 0.0)
    for row, length in ((0, 8), (1, 5), (2, 2)):
        expected["hard"] -= np.log(softmax(z[row])[batch["labels"][row]])
        expected["soft"] += T**2 * kl(softmax(v[row] / T), softmax(z[row] / T))
        for block, deep in ((0, 1), (1, 3)):
            x, y = a["hidden"][block, row, :length], b["hidden"][deep, row, :length]
            expected["hidden"] += np.square(x - y).mean() / 2
            x, y = (s["attn"]["scores"][i, row, :, :length, :length] for s, i in ((a, block), (b, deep)))
            expected["attention"] += np.square(x - y).mean() / 2
        x, y = (softmax(s["attn"]["scores"][-1, row, :, :length, :length]) for s in (a, b))
        expected["relations"] += kl(y, x).mean()
        x, y = (np.moveaxis(s["attn"]["values"][-1, row, :length], 1, 0) for s in (a, b))
        x, y = (softmax(v @ np.swapaxes(v, 1, 2) / np.sqrt(4)) for v in (x, y))
        expected["relations"] += kl(y, x).mean()
    for name, value in expected.items():
        np.testing.assert_allclose(aux.sums[name][0], value, rtol=2e-4, err_msg=name)
    weights = {"hard": 0.3, "soft": 0.7, **section.inner}
    np.testing.assert_allclose(total, sum(weights[name] * expected[name] for name in expected), rtol=2e-4)
    assert float(aux.weight) == 3


@pytest.mark.parametrize("large", [False, True])
def test_parts_of_a_batch_add_up_to_the_whole(large, monkeypatch):
    """Packed texts, ignored targets and a row of weight 0; also where logits are made a piece at a time."""
    if large:
        monkeypatch.setattr(losses, "FEW", 8)
        monkeypatch.setattr(losses, "at_once", lambda *shape: 3)
    section = Distill(teacher="it", **({**ALL, "alpha": 0.4} if not large else {"alpha": 0.4}))
    student, wide = create(MODEL), create(TEACHER)
    task = taught(section, TEACHER, student, CausalLM())
    params = {"model": arrays(student), "teacher": {"params": jax.tree.map(lambda x: 2 * x, arrays(wide)), "stats": {}}}
    batch = {name: rng.integers(0, 64, (4, 8)).astype(np.int32) for name in ("tokens", "targets")}
    batch["segment_ids"] = np.array([[1] * 4 + [2] * 3 + [0], [1] * 8, [1] * 3 + [0] * 5, [1] * 8], np.int32)
    batch["targets"][batch["segment_ids"] == 0] = IGNORED
    batch["weight"] = np.array([1, 1, 1, 0], np.float32)

    def run(part):
        def total(trained):
            return task.losses[0].fn({**params, "model": trained}, {}, part, jax.random.key(0))

        (value, aux), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params["model"])
        return jax.device_get((gradient, value, aux.weight, {name: s for name, (s, _) in aux.sums.items()}))

    halves = [run({name: x[half] for name, x in batch.items()}) for half in (slice(0, 2), slice(2, 4))]
    whole, added = run(batch), jax.tree.map(np.add, *halves)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), whole, added)
    z, v = (m.apply(p, batch["tokens"], segment_ids=batch["segment_ids"]) for m, p in
            ((student, params["model"]), (wide, params["teacher"]["params"])))  # fmt: skip
    z, v, counts = (np.asarray(x, float) for x in (z, v, (batch["targets"] >= 0) * batch["weight"][:, None]))
    expected = 4 * (kl(softmax(v / 2), softmax(z / 2)) * counts).sum() if large else None
    if large:
        np.testing.assert_allclose(whole[3]["soft"], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"), [("bert-masked", MaskedLM()), ("transformer", Seq2Seq()), ("resnet", Classification())]
)
def test_a_model_that_equals_its_teacher_has_no_divergence(name, kind):
    """The teacher is given the same masked tokens, its dropout is off, and it keeps its batch statistics."""
    config = {"bert-masked": replace(BERT, head="masked_lm"), "transformer": ZOO["transformer"][1],
              "resnet": ZOO["resnet"][1]}[name]  # fmt: skip
    if hasattr(config, "dropout"):
        config = replace(config, dropout=0.0)
    data = Synthetic(seq_len=8, batch_size=2)
    task = tasks.build(kind, config, data)
    made = Teaching.of(Distill(teacher="it"), replace(config, dropout=0.5) if hasattr(config, "dropout") else config)
    params, stats = {"model": arrays(create(config))}, task.stats()
    params["teacher"] = {"params": params["model"], "stats": stats.get("model", {})}
    batch = fill(task.batch_spec(2))
    found = jax.jit(made.taught(task).losses[0].fn)(params, stats, batch, jax.random.key(0))[1]
    plain = jax.jit(task.losses[0].fn)(params, stats, batch, jax.random.key(0))[1]
    np.testing.assert_allclose(found.sums["hard"][0], plain.sums["loss"][0], rtol=1e-5)
    soft = float(found.sums["soft"][0])
    assert abs(soft) < 1e-4 if name != "resnet" else soft > 0  # the student's own statistics are of the batch
    jax.tree.map(np.testing.assert_array_equal, found.stats, plain.stats)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    run = tmp_path_factory.mktemp("distillation") / "teacher"
    runs.train(PLAIN, run)
    return run


def student(teacher, **fields):
    given = {"model": MODEL, "distill": Distill(teacher=str(teacher), **ALL), **fields}
    return replace(PLAIN, **given)


@pytest.fixture(scope="module")
def run(teacher):
    run = teacher.with_name("student")
    runs.train(student(teacher), run)
    return run


def test_a_checkpoint_holds_the_student_alone_and_names_the_teacher(run, teacher):
    tree = json.loads((run / "checkpoints" / "2" / "manifest.json").read_text())["tree"]
    assert {name.split("/")[0] for name in tree} == {"step", "params", "opt_state", "rng"}
    assert not any("teacher" in name for name in tree)
    meta = json.loads((run / "checkpoints" / "2" / "meta.json").read_text())
    assert meta["teacher"]["source"] == str(teacher) and len(meta["teacher"]["hash"]) == 32
    count = sum(leaf.size for leaf in jax.tree.leaves(load_run(teacher).params))
    assert f"teacher: GPT2, {count:,} parameters, {4 * count:,} bytes" in (run / "log.txt").read_text()
    row = load_run(run).metrics[-1]
    assert {"train/soft", "train/hard", "train/hidden", "train/attention", "train/relations"} <= {*row}


def test_the_teacher_is_the_run_and_never_changes(teacher):
    job = assemble(student(teacher), jax.devices()[:1], opened=False)
    state = runs.beginning.initial(job)
    expected = load_run(teacher).params["model"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.teacher["teacher"]["params"]), expected)
    moments = [leaf for leaf in jax.tree.leaves(job.layout.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * job.trained() == 2 * create(MODEL).count()
    batch = jax.device_put(fill(job.task.batch_spec(8)), job.task.shardings(job.mesh, job.batch))
    before = jax.device_get(state.params)
    after, _ = job.step()(state, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.teacher["teacher"]["params"]), expected)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after.params)), strict=True))


def test_a_student_is_used_without_its_teacher(run, teacher, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    away = teacher.rename(teacher.with_name("away"))
    try:
        assert cli.main(["eval", str(alone)]) == 0
        assert cli.main(["report", str(alone)]) == 0
        assert cli.main(["export", str(alone), str(tmp_path / "hf")]) == 0
        opened = load_run(alone)
        assert {*opened.params} == {"model"} and opened.task.teacher is None
        assert opened.evaluation().measure()["loss"] == pytest.approx(opened.metrics[-1]["eval/loss"], rel=1e-5)
        with pytest.raises(UserError, match=r"got distill.teacher .*, which is no run and no published model"):
            runs.train(student(teacher, train=Train(steps=3)), alone, "must")
    finally:
        away.rename(teacher)


def test_a_resumed_run_has_the_same_bits_and_the_same_teacher(run, teacher, tmp_path):
    again, other, moved = (tmp_path / name for name in ("again", "other", "moved"))
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "2")
    shutil.copytree(teacher, moved)
    runs.train(student(moved), again)  # what has only been moved is the same teacher
    trees = [Checkpointer(each / "checkpoints").restore_params(2)[0] for each in (run, again)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    runs.train(replace(PLAIN, train=Train(steps=1, seed=1)), other)
    with pytest.raises(UserError, match=r"got weights of the hash .* to teach .*, expected weights of the hash"):
        runs.train(student(other, train=Train(steps=3)), again, "must")
    with pytest.raises(UserError, match=r"got no teacher to teach .*, expected weights of the hash .*try --distill"):
        runs.train(student(other, train=Train(steps=3), distill=Distill()), again, "must")


def test_a_step_on_eight_devices_equals_one_device_and_microbatches_one_batch(teacher):
    """Each network is cut by its own axes: the teacher here is wider than the student."""
    cfg = student(teacher, model=replace(MODEL, width=8, heads=2), distill=Distill(teacher=str(teacher), alpha=0.5))
    found = []
    for mesh, devices, accumulate in ((Mesh(), 1, 1), (Mesh(data=2, fsdp=2, tensor=2), 8, 2)):
        job = assemble(
            replace(cfg, mesh=mesh, train=Train(steps=2, accumulate=accumulate)), jax.devices()[:devices], opened=False
        )
        state = runs.beginning.initial(job)
        placed = jax.tree.map(lambda leaf: leaf.sharding, job.layout.params)
        state = replace(state, params=jax.device_put({"model": arrays(create(cfg.model))}, placed))
        if devices == 8:
            sharding = state.teacher["teacher"]["params"]["layers"]["mlp"]["up"]["w"].sharding
            assert {"fsdp", "tensor"} <= {*jax.tree.leaves(tuple(sharding.spec))}
        batch = jax.device_put(fill(job.task.batch_spec(8)), job.task.shardings(job.mesh, job.batch))
        state, metrics = job.step()(state, batch)
        found.append((jax.device_get(state.params), {k: float(v) for k, v in metrics.items()}))
    (one, measured), (eight, others) = found
    assert measured == pytest.approx(others, rel=1e-4)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), one, eight)


def test_the_teachers_forward_pass_and_bytes_are_counted(teacher):
    cfg = student(teacher, distill=Distill(teacher=str(teacher)))
    job, plain = assemble(cfg, opened=False), replace(PLAIN, model=MODEL)
    alone = flops.per_step(plain.task, plain.model, plain.data)
    forward = flops.per_step(PLAIN.task, TEACHER, PLAIN.data)
    assert job.flops().model == alone.model + forward.model // 3
    assert job.parameters() == job.trained() == create(MODEL).count()
    held = sum(leaf.size for leaf in jax.tree.leaves(job.layout.teacher))
    assert held == create(TEACHER).count()


def test_a_teacher_in_bfloat16_takes_half_the_memory(teacher):
    cfg = student(teacher, distill=Distill(teacher=str(teacher), dtype="bfloat16"))
    state = runs.beginning.initial(assemble(cfg, jax.devices()[:1], opened=False))
    params = state.teacher["teacher"]["params"]
    assert params["layers"]["mlp"]["up"]["w"].dtype == jnp.bfloat16 and params["norm"]["scale"].dtype == jnp.float32
    changed = jax.tree.map(lambda x: x, params)
    changed["layers"]["mlp"]["up"]["w"] = params["layers"]["mlp"]["up"]["w"] * 1.01
    assert bases.fingerprint(params) != bases.fingerprint(changed)


def test_an_adapter_learns_of_a_teacher_too(teacher, tmp_path):
    cfg = student(teacher, model=TEACHER, init=Init(source=str(teacher)), adapter=LoRA(rank=2, targets=("*/mlp/*",)))
    runs.train(cfg, tmp_path / "run")
    meta = json.loads((tmp_path / "run" / "checkpoints" / "2" / "meta.json").read_text())
    assert {"base", "teacher"} <= {*meta}
    assert load_run(tmp_path / "run").step == 2


def test_a_student_may_begin_with_layers_of_its_teacher(teacher):
    cfg = student(teacher, init=Init(source=str(teacher), blocks=(1, 3)))
    state = runs.beginning.initial(assemble(cfg, jax.devices()[:1], opened=False))
    theirs, ours = load_run(teacher).params["model"], jax.device_get(state.params["model"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[np.array([1, 3])]), ours["layers"], theirs["layers"])
    np.testing.assert_array_equal(ours["embed"]["w"], theirs["embed"]["w"])
    for layers, said in (((1,), "got 1 of the source's layers"), ((1, 4), "init.blocks 4 .* below its model.layers 4")):
        wrong = replace(cfg, init=replace(cfg.init, blocks=layers))
        with pytest.raises(UserError, match=said):
            runs.beginning.initial(assemble(wrong, jax.devices()[:1], opened=False))
    with pytest.raises(UserError, match=r"got init.blocks \(1, 3\) with no init.source"):
        assemble(replace(cfg, init=Init(blocks=(1, 3))), opened=False)


def test_a_teacher_is_named_on_the_command_line(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from jaxmodels.config import Config\nfrom jaxmodels.models.gpt2 import GPT2Config\n"
        "def get_config():\n    return Config(model=GPT2Config())\n"
    )
    argv = [str(file), "--distill.alpha", "0.9", "--distill.teacher", "runs/it", "--distill.hidden", "1"]
    cfg, _ = configured(argv, "jaxmodels train", NoOptions)
    assert cfg.distill == Distill(teacher="runs/it", alpha=0.9, hidden=1)
    plain, _ = configured([str(file)], "jaxmodels train", NoOptions)
    assert configs.from_json({k: v for k, v in configs.to_json(plain).items() if k != "distill"}) == plain


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": replace(MODEL, vocab_size=65)}, "with model.vocab_size 64, expected 65, the vocabulary"),
        ({"task": MaskedLM(), "model": replace(BERT, context=16)}, "(answers: continuation), expected one of masked"),
        ({"task": GAN(), "model": ZOO["dcgan"][1]}, "causal_lm (answers: continuation), expected one of gan"),
        ({"data": Synthetic(seq_len=32, batch_size=8), "model": replace(MODEL, context=32)},
         "which this task could not train: got data.seq_len 32, expected at most model.context 16"),
        ({"model": replace(MODEL, width=8)}, "distill.hidden with model.width 8 and the teacher's 16"),
        ({"model": replace(MODEL, heads=2)}, "distill.attention with model.heads 2 and the teacher's 4"),
        ({"model": replace(MODEL, layers=5)}, "model.layers 5 and a teacher of 4 layers, expected no more"),
        ({"mesh": Mesh(stage=2)}, "distill.hidden 0.5 with mesh.stage 2, expected whole stacks"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_work(teacher, fields, said):
    with pytest.raises(UserError) as refused:
        assemble(student(teacher, **fields), jax.devices()[: 2 if "mesh" in fields else 1], opened=False)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"alpha": 0.9}, "distill.alpha 0.9 without distill.teacher, expected a teacher"),
        ({"teacher": "it", "alpha": 0.0}, "distill.alpha 0 and distill.hidden"),
        ({"teacher": "it", "temperature": 0.0}, "temperature 0.0, expected above 0"),
        ({"teacher": "it", "alpha": 1.5}, "alpha 1.5, expected at most 1"),
    ],
)
def test_what_could_teach_nothing_is_refused(fields, said):
    with pytest.raises(UserError) as refused:
        Distill(**fields)
    assert said in str(refused.value)


def test_a_task_without_labels_or_tokens_has_no_teacher():
    task = tasks.build(GAN(), ZOO["dcgan"][1], Synthetic())
    with pytest.raises(UserError, match=r"a task whose outputs are not those of one network"):
        Teaching.of(Distill(teacher="it"), BERT).taught(task)
