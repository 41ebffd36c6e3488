"""The search over ways to run a step: what arithmetic rules out, what is compiled, and what wins."""

import collections
import dataclasses
import importlib.util
import json
import math
import random
import shlex

import pytest

from jaxmodels import cli
from jaxmodels import config as configs
from jaxmodels.commands.options import configured
from jaxmodels.commands.plan import PlanOptions, planned, topologies_of
from jaxmodels.config import SGD, Classification, Config, Mesh, Stdlib, Tokens
from jaxmodels.errors import UserError
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.mixtral import MixtralConfig
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.models.resnet import ResNetConfig
from jaxmodels.plan import arithmetic, candidates, search, topology
from jaxmodels.plan import compile as compiling

LLAMA = LlamaConfig(
    vocab_size=4096, context=8192, layers=4, heads=16, kv_heads=8, width=512, mlp_width=1024, dtype="bfloat16"
)
CONFIG = Config(model=LLAMA, data=Tokens(seq_len=8192, batch_size=64), mesh=Mesh(data=1, fsdp=-1))
IMAGES = Config(MLPConfig((8, 8, 1), 10, (64,)), Classification(), Stdlib())
ON = topology.parse("h100:4x8")
EXPERT = [
    dict(data=1, fsdp=32),
    dict(data=32),
    dict(data=4, fsdp=8),
    dict(data=1, fsdp=16, tensor=2),
    dict(data=1, fsdp=8, tensor=4),
    dict(data=1, fsdp=8, tensor=4, sequence=True),
    dict(data=1, fsdp=4, tensor=8, sequence=True),
    dict(data=4, tensor=8),
    dict(data=1, fsdp=16, context=2),
    dict(data=2, fsdp=16),
]


@pytest.fixture(scope="module")
def judged():
    return arithmetic.Arithmetic(CONFIG, ON)


@pytest.fixture
def drawn(judged, monkeypatch):
    """What there is to try of CONFIG, drawn once."""
    if not hasattr(judged, "drawn"):
        judged.drawn = candidates.draw(judged)
    monkeypatch.setattr(search, "Arithmetic", lambda cfg, topology: judged)
    monkeypatch.setattr(search, "draw", lambda judged: judged.drawn)


def settled(cfg, devices=32):
    """A config's mesh with nothing left open."""
    sizes = configs.flatten(cfg.mesh)
    left = devices // math.prod(n for name, n in sizes.items() if name in SIZES and n > 0)
    return Mesh(**{name: left if n == -1 else n for name, n in sizes.items()})


SIZES = ("data", "stage", "fsdp", "expert", "context", "tensor")


@pytest.fixture
def fake(monkeypatch):
    """Put `seconds, peak = judge(cfg)` in the compiler's place; gives the list of what was compiled."""
    seen = []

    def install(judge):
        def compiled(cfg, topology):
            seen.append(cfg)
            seconds, peak = judge(cfg)
            return {
                "fits": peak <= topology.hardware.memory,
                "fits_host": True,
                "memory": {"peak": peak, "device": topology.hardware.memory},
                "step_seconds": seconds,
                "compile_seconds": 0.0,
                "unit": "tokens",
                "per_second": 1 / seconds,
                "mfu": 0.5,
                "binds": "compute",
            }

        monkeypatch.setattr(compiling, "compiled", compiled)
        monkeypatch.setattr(search, "figures", lambda cfg, made: made)
        return seen

    return install


@pytest.mark.parametrize("seed", range(5))
def test_the_winner_is_no_worse_than_the_best_of_ten_meshes_that_an_expert_tries(fake, drawn, seed):
    def judge(cfg):  # whatever the compiler says of a mesh
        mesh = settled(cfg)
        return random.Random(f"{seed} {mesh}").uniform(1, 2), 30e9

    seen = fake(judge)
    found = search.search(CONFIG, ON, 40, 2, lambda text: None)
    meshes = [Mesh(**sizes) for sizes in EXPERT]
    assert {settled(cfg) for cfg in seen} >= set(meshes)
    best = min(judge(dataclasses.replace(CONFIG, mesh=mesh))[0] for mesh in meshes)
    assert found.winner.cost[0] <= best
    assert len(seen) == len(found.tried) == 40
    assert len({json.dumps(configs.to_json(cfg), sort_keys=True) for cfg in seen}) == 40, "none twice"


def test_what_is_usual_follows_the_model_and_the_hardware(judged):
    assert [dataclasses.asdict(mesh) for mesh in candidates.usual(judged)] == [
        dataclasses.asdict(Mesh(**sizes)) for sizes in EXPERT
    ]
    mixture = MixtralConfig(vocab_size=512, layers=2, heads=4, kv_heads=2, width=64, mlp_width=128, experts=8)
    data = dataclasses.replace(CONFIG.data, seq_len=512)
    meshes = candidates.usual(arithmetic.Arithmetic(dataclasses.replace(CONFIG, model=mixture, data=data), ON))
    assert Mesh(data=1, expert=8, fsdp=4) in meshes
    assert all(mesh.context == 1 for mesh in meshes), "512 tokens are not worth cutting"
    assert all(mesh.tensor == 1 for mesh in candidates.usual(arithmetic.Arithmetic(IMAGES, ON)))


def test_arithmetic_counts_what_a_device_keeps(judged):
    matrices = 2 * 4096 * 512 + 4 * (512 * (16 + 8 + 8 + 16) * 32 + 3 * 512 * 1024)
    norms = 4 * 2 * 512 + 512
    copies = 2 + 1 + 1  # moments, parameters, gradients
    for sizes, parts in ((dict(data=1, fsdp=32), 32), (dict(data=4, fsdp=4, tensor=2), 8), (dict(data=32), 1)):
        kept = judged.guess(dataclasses.replace(CONFIG, mesh=Mesh(**sizes))).kept
        # norms are cut by fsdp too
        cut = sizes.get("fsdp", 1)
        assert kept == pytest.approx(4 * copies * (matrices / parts + norms / cut), rel=0.02)


def test_recomputing_and_microbatches_make_the_guess_smaller_and_slower(judged):
    def guess(remat="none", accumulate=1, **mesh):
        model = dataclasses.replace(CONFIG.model, remat=remat)
        train = dataclasses.replace(CONFIG.train, accumulate=accumulate)
        return judged.guess(dataclasses.replace(CONFIG, model=model, train=train, mesh=Mesh(**mesh)))

    fsdp = dict(data=1, fsdp=32)
    none, dots, full, offload = (guess(remat, **fsdp) for remat in ("none", "dots", "full", "offload"))
    assert none.activations > dots.activations > full.activations
    assert none.seconds < dots.seconds < full.seconds <= offload.seconds
    inputs = 4 * 64 / 32 * 8192 * 512 * 2  # of 4 blocks, in bfloat16
    assert full.activations - offload.activations == pytest.approx(inputs)
    unpublished = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, remat="offload"))
    assert arithmetic.Arithmetic(unpublished, topology.parse("v7:2x2x4")).guess(unpublished).seconds > 0
    assert guess(accumulate=2, **fsdp).activations == pytest.approx(none.activations / 2, rel=0.05)
    assert guess(data=1, fsdp=16, tensor=2).seconds > none.seconds, "what tensor sums is waited for"
    sizes = dict(data=1, stage=1, fsdp=4, expert=1, context=1, tensor=8)
    across = dict(sizes, fsdp=2, tensor=16)
    inside, outside = (judged.rate(tuple(each.items()), "tensor") for each in (sizes, across))
    assert (inside, outside) == (0.8 * 450e9, 0.8 * 400e9), "beyond a node over the network, by all its adapters"
    assert judged.rate(tuple(sizes.items()), "fsdp") == 0.8 * 50e9, "each by its own adapter"
    assert all(each.least <= each.seconds for each in (none, dots, full))


def test_every_way_is_kept_or_counted_with_its_reason(judged):
    large = dataclasses.replace(LLAMA, layers=48, width=4096, mlp_width=16384, heads=32, kv_heads=2)
    drawn = candidates.draw(arithmetic.Arithmetic(dataclasses.replace(CONFIG, model=large), ON))
    assert set(drawn.dropped) == {
        "the mesh does not divide a parameter, the batch or its tokens",
        "parameters and optimizer do not fit",
    }, "what activations need is the compiler's to say"
    assert drawn.number == len(drawn.kept) + sum(drawn.dropped.values())
    assert any("--mesh.data 32 --mesh.fsdp 1" in mesh and "do not fit" in told for mesh, told in drawn.refused.items())
    memory = ON.hardware.memory
    assert all(each.guess.arguments <= memory for each in drawn.kept)
    assert any(each.guess.peak > memory for each in drawn.kept)
    assert all(each.cfg.data == CONFIG.data for each in drawn.kept), "the batch stays whole"
    assert all(each.cfg.mesh.tensor <= 8 for each in drawn.kept), "tensor stays in a node"


def test_nothing_that_fits_is_one_line_with_what_is_missing(judged):
    reasons = collections.Counter({"parameters, optimizer and gradients do not fit": 70})
    found = search.Found(ON, candidates.Drawn([], reasons, {}))
    with pytest.raises(UserError, match=r"got h100:4x8, .*\(70 ways: parameters.* do not fit\), try more"):
        found.winner  # noqa: B018
    plan = {"fits": False, "fits_host": True, "memory": {"peak": 3 * 2**36}}
    each = candidates.Candidate(CONFIG, CONFIG.mesh, "", judged.guess(CONFIG))
    found.tried = [search.Tried(each, plan), search.Tried(each, None, "it broke")]
    with pytest.raises(UserError, match=r"the least needs 192.0 of 79.1 GiB"):
        found.winner  # noqa: B018


def test_a_candidate_that_fails_is_a_row_and_not_the_end(fake, drawn):
    def judge(cfg):
        if cfg.mesh.tensor == 2:
            raise UserError("got a mesh that this compiler dislikes")
        if cfg.mesh.tensor == 4:
            raise RuntimeError("the compiler\nfell over")
        return 1.0, 1e9

    fake(judge)
    said = []
    found = search.search(CONFIG, ON, 20, 1, said.append)
    failed = [each for each in found.tried if each.plan is None]
    assert {"got a mesh that this compiler dislikes", "the compiler fell over"} == {each.failure for each in failed}
    assert len(found.tried) == 20
    assert any("failed: the compiler fell over" in line for line in said)
    assert sum(line.startswith("[") for line in said) == 20, "a line for each"
    assert f"{len(failed)} failed" in search.report(found, CONFIG)


def test_the_frontier_has_what_is_faster_or_smaller_than_all_others(fake, drawn):
    def judge(cfg):
        draw = random.Random(str(cfg))
        return draw.uniform(1, 2), draw.uniform(1e9, 100e9)

    fake(judge)
    found = search.search(CONFIG, ON, 40, 1, lambda text: None)
    costs = [each.cost for each in found.tried if each.plan["fits"]]
    front = [each.cost for each in found.frontier]
    assert len(front) > 1
    assert front == sorted(c for c in costs if not any(o[0] <= c[0] and o[1] <= c[1] and o != c for o in costs))
    assert found.winner.cost[0] == min(costs)[0]
    assert front[-1][1] == min(peak for _, peak in costs)


def test_the_queue_learns_from_what_was_compiled(fake, drawn):
    seen = fake(lambda cfg: (50.0 if cfg.model.remat == "none" else 10.0, 1e9))
    search.search(CONFIG, ON, 40, 1, lambda text: None)
    later = [cfg.model.remat for cfg in seen[-20:]]
    assert later.count("none") <= 6, "by the guess alone they are the fastest"


def test_what_compiled_steps_show_to_be_hopeless_is_not_compiled(drawn, judged):
    def candidate(remat, accumulate, mesh=CONFIG.mesh):
        model = dataclasses.replace(LLAMA, remat=remat)
        train = dataclasses.replace(CONFIG.train, accumulate=accumulate)
        cfg = dataclasses.replace(CONFIG, model=model, train=train, mesh=mesh)
        return candidates.Candidate(cfg, candidates.settled(mesh, judged), "", judged.guess(cfg))

    def tried(each, fits, seconds=1.0, host=True):
        return search.Tried(each, {"fits": fits, "fits_host": host, "step_seconds": seconds, "memory": {"peak": 1}})

    large = [tried(candidate("dots", 1), False)]
    assert not search.hopeless(candidate("none", 1), [tried(candidate("offload", 1), False, host=False)])
    assert search.hopeless(candidate("none", 1), large), "more is kept"
    assert search.hopeless(candidate("none", 1, Mesh(data=1, fsdp=32)), large), "the same mesh, written out"
    assert not search.hopeless(candidate("full", 1), large)
    assert not search.hopeless(candidate("dots", 2), large)
    assert not search.hopeless(candidate("none", 1, Mesh(data=2, fsdp=16)), large)
    least = candidate("none", 1).guess.least
    assert search.hopeless(candidate("none", 1), [tried(candidate("full", 1), True, 0.9 * least)])
    assert not search.hopeless(candidate("none", 1), [tried(candidate("full", 1), True, 1.1 * least)])


def test_the_options_of_the_winner_are_read_back_as_the_winner(fake, root, tmp_path, monkeypatch, capsys):
    file = str(root / "configs" / "llama3_8b_c4.py")

    def judge(cfg):
        return (100.0 if cfg.mesh.data == 2 else 200.0) - 10 * (cfg.model.remat == "dots"), 1e9

    seen = fake(judge)
    monkeypatch.chdir(tmp_path)
    cfg, options = configured([file, "--on", "h100:4x8", "--search", "--json", "all.json"], "plan", PlanOptions)
    planned(cfg, options, file)
    written = (tmp_path / "h100-4x8.args").read_text()
    again, _ = configured([file, *shlex.split(written)], "train", PlanOptions)
    won = min(seen, key=judge)
    assert again == won
    assert (won.mesh.data, won.model.remat) == (2, "dots")
    assert f"jaxmodels train {file} {written.strip()}" in capsys.readouterr().out
    (made,) = json.loads((tmp_path / "all.json").read_text())
    assert made["winner"]["arguments"] == shlex.split(written)
    assert len(made["tried"]) == 40


def test_ways_that_hardware_or_a_pipeline_has_not_are_not_tried():
    def kinds(on, **mesh):
        judged = arithmetic.Arithmetic(CONFIG, topology.parse(on))
        ways = candidates.knobs(CONFIG, judged, Mesh(**{"data": 1, "fsdp": 8, **mesh}))
        return {cfg.model.remat for cfg in ways}

    assert kinds("h100:1x8") == {"none", "dots", "full", "offload"}
    assert "offload" not in kinds("h100:1x8", fsdp=4, stage=2)
    assert "offload" not in kinds("v7:2x2x1"), "nobody says how fast its link to the host is"
    assert candidates.remats(ResNetConfig()) == ["none", "full"]


def test_blocks_are_tried_without_a_loop_over_them(fake, drawn):
    fake(lambda cfg: (1.0 / cfg.model.unroll, 1e9))
    found = search.search(CONFIG, ON, 40, 1, lambda text: None)
    assert {each.cfg.model.unroll for each in found.drawn.kept} == {1, 4}
    assert found.winner.candidate.cfg.model.unroll == 4
    assert "--model.unroll 4" in search.report(found, CONFIG)
    assert found.padded is None, "its vocabulary is whole"


def test_a_padded_vocabulary_is_suggested_where_it_is_faster_and_never_taken(fake, monkeypatch):
    cfg = dataclasses.replace(CONFIG, model=dataclasses.replace(LLAMA, vocab_size=4090))
    judged = arithmetic.Arithmetic(cfg, on := topology.parse("h100:1x8"))
    ways = candidates.draw(judged)  # once for both searches
    monkeypatch.setattr(search, "Arithmetic", lambda cfg, topology: judged)
    monkeypatch.setattr(search, "draw", lambda judged: ways)
    fake(lambda cfg: (1.0 if cfg.model.vocab_size % 128 else 0.8, 1e9))
    say = lambda text: None  # noqa: E731
    found = search.search(cfg, on, 3, 1, say)
    assert found.winner.candidate.cfg.model.vocab_size == 4090
    assert "--model.vocab-size 4096 in place of 4090 the step takes 0.800 of that" in search.report(found, cfg)
    assert len(found.tried) == 3 and search.written(found, cfg)["padded"]["plan"]["step_seconds"] == 0.8
    fake(lambda cfg: (1.0, 1e9))
    found = search.search(cfg, on, 3, 1, say)
    assert "vocab" not in search.report(found, cfg), "it is no faster"
    four = candidates.Candidate(cfg, Mesh(data=2, tensor=4), "", found.winner.candidate.guess)
    assert search.padded(four).cfg.model.vocab_size == 4096
    images = candidates.Candidate(IMAGES, Mesh(), "", four.guess)
    assert search.padded(images) is None


def test_a_shape_alone_is_of_the_hardware_before_it():
    assert [each.name for each in topologies_of("v5p:4x4x4,8x8x8,h100:1x8,2x8")] == [
        "v5p:4x4x4",
        "v5p:8x8x8",
        "h100:1x8",
        "h100:2x8",
    ]


def test_a_search_that_cannot_be_is_one_line(root, capsys):
    config = str(root / "configs" / "gpt2_openwebtext.py")
    for arguments, told in (
        (["--search", "--scaling"], "expected one of them"),
        (["--search", "--candidates", "0"], "got candidates 0, expected at least 1"),
        (["--search", "--on", "h100:1x8,2x8", "--out", "x"], "try without --out"),
        (["--scaling"], "try --on v5p:4x4x4,8x8x8,16x16x16"),
        (["--json", "/nowhere/plan.json"], "got --json /nowhere/plan.json, whose folder does not exist"),
        (["--search", "--out", "/"], "got --out /, which is a folder, expected a place for a file"),
        (["--out", "x"], "got --out x without --search or --scaling, expected both, try --search"),
        (["--workers", "2"], "got --workers 2 without --search or --scaling"),
        (["--scaling", "--candidates", "3"], "got --candidates 3 without --search"),
        (["--search", "--save-rate", "2"], "got --save-rate 2 without --failures"),
    ):
        assert cli.main(["plan", config, *([] if "--on" in arguments else ["--on", "h100:1x8"]), *arguments]) == 2
        assert told in capsys.readouterr().err


def test_attention_that_only_the_reference_computes_is_judged_by_it():
    dropping = GPT2Config(vocab_size=512, context=256, layers=2, heads=4, width=64, dropout=0.1)
    data = dataclasses.replace(CONFIG.data, seq_len=256)
    judged = arithmetic.Arithmetic(dataclasses.replace(CONFIG, model=dropping, data=data), ON)
    assert judged.saved("none", "blockwise") == judged.saved("none", "xla")
    scores = 2 * 4 * 256 * 256 * 4
    assert judged.saved("none", "xla").rows + judged.saved("none", "xla").rows_cut > 2 * scores


def test_what_the_optimizer_and_the_average_keep_is_counted():
    train, optim = dataclasses.replace(CONFIG.train, ema=0.99), SGD()
    light = arithmetic.Arithmetic(dataclasses.replace(CONFIG, train=train, optim=optim), ON)
    assert light.copies == pytest.approx(1, rel=0.01)


def test_a_real_search_finds_the_fastest_and_goes_on_from_what_is_compiled(root, tmp_path, capsys, monkeypatch):
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        pytest.skip("needs the compiler jax_cuda12_plugin: pip install 'jaxmodels[aot]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small = ["--model.layers", "2", "--model.width", "256", "--model.heads", "4", "--data.batch-size", "16"]
    asked = ["plan", str(root / "configs" / "gpt2_openwebtext.py"), "--on", "h100:1x4", "--search", *small]
    assert cli.main([*asked, "--candidates", "1", "--workers", "2", "--json", "first.json"]) == 0
    assert capsys.readouterr().out.count("s to compile") == 1
    assert cli.main([*asked, "--candidates", "2", "--workers", "2", "--json", "second.json"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" cached ") == 1
    first, second = (json.loads((tmp_path / name).read_text())[0] for name in ("first.json", "second.json"))
    assert second["tried"][0] == first["tried"][0]
    times = [each["plan"]["step_seconds"] for each in second["tried"] if each["plan"]["fits"]]
    assert second["winner"]["plan"]["step_seconds"] == min(times)
    for each in second["tried"]:
        kept = sum(each["plan"]["memory"][name] for name in ("parameters", "optimizer", "gradients"))
        assert each["guess"]["peak"] > kept
        assert 0.5 < each["guess"]["peak"] / each["plan"]["memory"]["peak"] < 2, "the guess is rough, not wrong"
    text = (tmp_path / "h100-1x4.args").read_text()
    assert all(f"{small[i]} {small[i + 1]}" in text for i in range(0, len(small), 2)), "those that were given too"
    assert ("--mesh." in text) == (second["winner"]["plan"]["mesh"]["data"] != 4), "what differs from the config"
