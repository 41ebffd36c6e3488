"""What the plan predicts against what others measured and published."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from benchmarks import record
from jaxmodels.config import TFDS, AdamW, Augment, Classification, Config, Mesh, Tokens, Train
from jaxmodels.models.families import preset
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.models.llama import LlamaConfig
from jaxmodels.models.vit import ViTConfig
from jaxmodels.plan import compile as compiling
from jaxmodels.plan import figures, topology

RECORD, TITLE = "plan_vs_published", "The plan against published throughput"
COLUMNS = {
    "name": "job", "on": "hardware", "settings": "settings", "measured": "measured", "predicted": "predicted",
    "unit": "of", "percent": "error", "fitted": "chosen by it", "binds": "bound by", "peak": "GiB of a device",
    "commit": "predicted at", "note": "what differs", "source": "source",
}  # fmt: skip
MAXTEXT = "AI-Hypercomputer/maxtext"
RECIPES = "AI-Hypercomputer/tpu-recipes, training/trillium"
IRONWOOD = "AI-Hypercomputer/tpu-recipes, training/ironwood/README.md and llama3.1-405b/8k-bf16-tpu7x-4x8x8"
BRIDGE = "NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary.md, 25.11, FP8 with current scaling"
TITAN = "pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"


@dataclass(frozen=True)
class Row:
    """A published measurement, and our config of the same job."""

    measured: float
    """Of `of`: units a second and device, or a share of the peak with attention counted in full."""
    on: str
    config: Config
    source: str
    of: str = "per_second_device"
    fitted: bool = False
    """Whether a constant of `plan/roofline.py` was chosen by it."""
    note: str = ""
    """What differs from the published job."""
    other: Config | None = None
    """A second config, where the published step lies half-way between two that can be asked for."""
    hardware: tuple[tuple[str, float], ...] = ()
    """What differs from the table's hardware: factors of its fields."""


def language(model: Any, rows: int, length: int, mesh: Mesh, **train: Any) -> Config:
    """A step of a language model in bfloat16 on tokens that are there."""
    return Config(
        model=dataclasses.replace(model, dtype="bfloat16"),
        data=Tokens(path=("train.bin", "eval.bin"), seq_len=length, batch_size=rows),
        train=Train(**train),
        mesh=mesh,
    )


def maxtext(scale: int, **changes: Any) -> LlamaConfig:
    """MaxText's model of `global_parameter_scale`, in billions: depth, width, heads and MLP grow by powers of two."""
    base, rest = divmod(scale.bit_length() - 1, 3)
    wide, width = 2 ** (base + (rest > 0)), 2048 * 2 ** (base + (rest > 1))
    shape = LlamaConfig(
        vocab_size=32000, layers=16 * 2**base, width=width, heads=16 * wide, kv_heads=16 * wide, head_dim=128,
        mlp_width=7168 * wide, tied=True,
    )  # fmt: skip
    return dataclasses.replace(shape, **changes)


LEVANTER = GPT2Config(vocab_size=50304, context=1024, remat="full", attention="xla")
LEVANTER_SOURCE = "stanford-crfm/levanter, docs/Levanter-1.0-Release.md"
V3 = Mesh(data=1, fsdp=256)
LLAMA3 = dataclasses.replace(preset("llama3.1-8b"), remat="full")
DOTS = dataclasses.replace(LLAMA3, remat="dots")
KEPT = dataclasses.replace(LLAMA3, remat="none")
TITAN_GPU = (("bandwidth", 2.4 / 3.352), ("flops", (500 / 700) ** (1 / 3)))
"""HBM2e, and 500 W of 700 W: power grows as the cube of the clock."""
VIT = Config(
    model=ViTConfig(dtype="bfloat16", attention="xla", dropout=0.1),
    task=Classification(),
    data=TFDS(name="imagenet2012", batch_size=512 * 8),
    augment=Augment(),
    optim=AdamW(),
    # otherwise XLA (jax 0.10.2) finds no tiles for a product with dropout where it has no GPU to try them
    train=Train(xla=("xla_gpu_enable_triton_gemm=false",)),
    mesh=Mesh(data=8),
)
ROSETTA = (
    "NVIDIA/JAX-Toolbox, rosetta/rosetta/projects/vit/README.md (11,669 and 7,200 images/s), pretrain.gin, layers.py"
)
VIT_NOTE = "theirs reads and decodes ImageNet while it trains"
ROWS = {
    "maxtext-22b": Row(
        0.567,
        "v4:4x4x4",
        language(
            GPT2Config(vocab_size=32000, context=2048, layers=48, heads=24, width=6144, mlp_width=24576, remat="full"),
            13 * 64, 2048, Mesh(data=1, fsdp=64),
        ),
        f"{MAXTEXT}, MaxText/configs/v4/README.md and 22b.sh",
        of="mfu",
        note="GELU and learned positions for ReLU and rotary ones",
    ),
    "maxtext-1160b": Row(
        0.6623,
        "v5p:16x16x24",
        language(
            maxtext(1024, layers=149, remat="full"),
            2 * 6144, 2048, Mesh(data=3, fsdp=256, tensor=8, sequence=True),
        ),
        f"{MAXTEXT}, README.md; settings of MaxText/configs/v5p/1024b.sh",
        of="mfu",
        note="shape and mesh are not published: those of 1024B, with more blocks, activations cut over tensor too",
    ),
    "llama3.1-8b-v6e-256": Row(
        7207,
        "v6e:16x16",
        language(LLAMA3, 4 * 256, 8192, Mesh(data=1, fsdp=256)),
        f"{RECIPES}/Llama3.1-8B-MaxText/v6e-256 (417 TFLOP/s a chip)",
        note="theirs keeps the products of attention in the host's memory, ours computes them again",
    ),
    "llama3.1-8b-v6e-8": Row(
        7194,
        "v6e:2x4",
        language(LLAMA3, 3 * 8, 8192, Mesh(data=1, fsdp=8)),
        f"{RECIPES}/Llama3.1-8B-MaxText/v6e-8 (417 TFLOP/s a chip)",
        fitted=True,
        note="as above",
    ),
    "mistral-7b-v6e-8": Row(
        7777,
        "v6e:2x4",
        language(
            dataclasses.replace(preset("mistral-7b"), window=None, remat="offload"),
            6 * 8, 8192, Mesh(data=1, fsdp=8),
        ),
        f"{RECIPES}/Mistral-7B-MaxText (432 TFLOP/s a chip)",
        note="theirs keeps the products of attention in the host's memory too, ours computes them again",
    ),
    "mixtral-8x7b-v6e-256": Row(
        3645,
        "v6e:16x16",
        language(
            dataclasses.replace(preset("mixtral-8x7b"), routing="capacity", capacity_factor=1.25, remat="offload"),
            12 * 256, 4096, Mesh(data=1, fsdp=256),
        ),
        f"{RECIPES}/Mixtral-8x7B-MaxText (302 TFLOP/s a chip)",
        note="as above",
    ),
    "gpt3-175b-v6e-256": Row(
        357.6,
        "v6e:16x16",
        language(
            GPT2Config(vocab_size=50304, context=2048, layers=96, heads=96, width=12288, remat="offload"),
            3 * 256, 2048, Mesh(data=1, fsdp=256),
        ),
        f"{RECIPES}/GPT3-175B-MaxText/bf16 (385 TFLOP/s a chip)",
        note="theirs keeps blocks' inputs in the device's memory",
    ),
    "llama3.1-405b-v7-256": Row(
        249.9,
        "v7:4x8x8",
        language(
            dataclasses.replace(preset("llama3.1-405b"), remat="full"),
            3 * 512, 8192, Mesh(data=1, fsdp=512), accumulate=3,
        ),
        f"{IRONWOOD} (1261 TFLOP/s a chip)",
        note="theirs keeps blocks' inputs in the host's memory, whose link has no published rate, and a moment in "
        "bfloat16; ours takes a third of the rows at a time",
    ),
    "torchtitan-8b": Row(
        6667,
        "h100:1x8",
        language(DOTS, 2 * 8, 8192, Mesh(data=1, fsdp=8)),
        f"{TITAN}, table 1",
        other=language(LLAMA3, 2 * 8, 8192, Mesh(data=1, fsdp=8)),
        note="HBM2e and 500 W; theirs keeps every other product, of which o and up are half of what remat full "
        "computes again",
        hardware=TITAN_GPU,
    ),
    "torchtitan-8b-128": Row(
        6514,
        "h100:16x8",
        language(DOTS, 2 * 128, 8192, Mesh(data=1, fsdp=128)),
        f"{TITAN}, table 3",
        other=language(LLAMA3, 2 * 128, 8192, Mesh(data=1, fsdp=128)),
        note="not asked for; as above",
        hardware=TITAN_GPU,
    ),
    "torchtitan-8b-float8": Row(
        8532,
        "h100:1x8",
        language(DOTS, 2 * 8, 8192, Mesh(data=1, fsdp=8), quantize="float8"),
        f"{TITAN}, table 1",
        other=language(LLAMA3, 2 * 8, 8192, Mesh(data=1, fsdp=8), quantize="float8"),
        note="as torchtitan-8b; theirs has the output layer in float8 too",
        hardware=TITAN_GPU,
    ),
    "torchtitan-405b": Row(
        100,
        "h100:64x8",
        language(
            dataclasses.replace(preset("llama3.1-405b"), layers=128, remat="full"),
            32 * 8, 8192, Mesh(data=1, stage=8, fsdp=8, tensor=8, sequence=True, microbatches=8),
            quantize="float8",
        ),
        f"{TITAN}, table 5, 1F1B",
        note="HBM2e and 500 W; 128 blocks, which 8 stages divide, for 126; GPipe for 1F1B, with 8 microbatches, which "
        "theirs has where none are asked for",
        hardware=TITAN_GPU,
    ),
    "torchtitan-405b-interleaved": Row(
        128,
        "h100:64x8",
        language(
            dataclasses.replace(preset("llama3.1-405b"), layers=128, remat="full"),
            32 * 8, 8192, Mesh(data=1, stage=8, fsdp=8, tensor=8, sequence=True, microbatches=8, rounds=2),
            quantize="float8",
        ),
        f"{TITAN}, table 5, interleaved 1F1B",
        note="as above; a stage has two slices of the layers",
        hardware=TITAN_GPU,
    ),
    "llama2-7b-h100": Row(
        11400,
        "h100:1x8",
        language(
            dataclasses.replace(preset("llama2-7b"), remat="dots", unroll=32), 4 * 8, 4096, Mesh(data=1, fsdp=8)
        ),
        f"NVIDIA/JAX-Toolbox; settings of {MAXTEXT}, MaxText/configs/a3/llama_2_7b/1vm.sh (492 TFLOP/s)",
        fitted=True,
    ),
    "llama3-8b-h100-float8": Row(
        14451,
        "h100:1x8",
        language(DOTS, 128, 8192, Mesh(data=1, fsdp=8), accumulate=16, quantize="float8"),
        f"{BRIDGE} (744 TFLOP/s)",
        note="theirs keeps all activations, for which XLA has no room beside what it holds",
    ),
    "llama3-8b-b200-float8": Row(
        30624,
        "b200:1x8",
        language(KEPT, 128, 8192, Mesh(data=1, fsdp=8), accumulate=8, quantize="float8"),
        f"{BRIDGE} (1576 TFLOP/s)",
        note="theirs shards the optimizer alone (ZeRO-1), ours all (ZeRO-3)",
    ),
    "llama3-8b-gb200-float8": Row(
        31508,
        "gb200:1x8",
        language(KEPT, 128, 8192, Mesh(data=1, fsdp=8), accumulate=8, quantize="float8"),
        f"{BRIDGE} (1622 TFLOP/s)",
        note="as above",
    ),
    "llm.c-124m": Row(
        468_000,
        "h100:1x8",
        language(GPT2Config(vocab_size=50304, unroll=12), 64 * 8, 1024, Mesh(data=8)),
        "karpathy/llm.c, scripts/run_gpt2_124M.sh; KellerJordan/modded-nanogpt's record of 2024-10-13",
        note="theirs shards the optimizer (ZeRO-1), and holds parameters in bfloat16",
    ),
    "llm.c-1558m": Row(
        46_800,
        "h100:1x8",
        language(
            GPT2Config(vocab_size=50304, layers=48, heads=25, width=1600, unroll=48),
            16 * 8 * 8, 1024, Mesh(data=1, fsdp=8), accumulate=8,
        ),
        "karpathy/llm.c, scripts/run_gpt2_1558M.sh (2.80 s a step)",
        note="theirs shards the optimizer alone (ZeRO-1), ours all (ZeRO-3)",
    ),
    "levanter-1.4b-v3": Row(
        0.417,
        "v3:8x16",
        language(dataclasses.replace(LEVANTER, layers=48, heads=24, width=1536), 512, 1024, V3),
        f"{LEVANTER_SOURCE}; config/gpt2_1536.yaml",
        of="mfu",
        note="the batch is not published: two rows a core",
    ),
    "levanter-13b-v3": Row(
        0.544,
        "v3:8x16",
        language(dataclasses.replace(LEVANTER, layers=40, heads=40, width=5120), 512, 1024, V3),
        LEVANTER_SOURCE,
        of="mfu",
        note="as above; shape of GPT-3 13B",
    ),
    "vit-b16-h100": Row(1459, "h100:1x8", VIT, ROSETTA, note=VIT_NOTE),
    "vit-b16-a100": Row(900, "a100:1x8", VIT, ROSETTA, note="as above"),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Which rows, and where the record goes."""

    rows: Positional[tuple[str, ...]] = ()
    """Names; none: all."""
    out: Path | None = None
    """Folder for the record; benchmarks/results when not given."""


def run(options: Options) -> None:
    """Compile each job for its hardware, predict, compare, and replace its row in the record."""
    names = options.rows or tuple(ROWS)
    record.check("row", names, ROWS)
    commit = record.git("rev-parse", "HEAD")[:12]
    found = {name: {**compare(name, ROWS[name]), "commit": commit} for name in names}
    shown = {key: COLUMNS[key] for key in ("name", "measured", "predicted", "percent", "binds")}
    print(record.markdown(list(found.values()), shown))
    rows = merged(found, (options.out or record.RESULTS) / f"{RECORD}.json")
    notes = summary(rows)
    print("\n".join(notes))
    print(record.write(RECORD, TITLE, rows, out=options.out, notes=notes, columns=COLUMNS))


def merged(found: Mapping[str, dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows of the record, of which some were just predicted; the others keep what they were predicted before."""
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "commit": ""}
    known = {row["name"]: {"commit": before["commit"][:12], **row} for row in before["rows"]}
    known |= found
    return [known[name] for name in ROWS if name in known]


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Means of absolute errors, in words, for the rows of each commit too where there are several."""

    def mean(errors: list[float], of: str) -> str:
        return f"mean absolute error of {len(errors)} {of}: {statistics.mean(map(abs, errors)):.1%}"

    compared = [row for row in rows if row["error"] is not None]
    if not compared:
        return []
    unseen = [row["error"] for row in compared if not row["fitted"]]
    lines = [mean([row["error"] for row in compared], "rows")]
    lines += [mean(unseen, "of them by which no constant was chosen")] if unseen else []
    commits = dict.fromkeys(row["commit"] for row in compared)
    for commit in commits if len(commits) > 1 else ():
        lines.append(mean([row["error"] for row in compared if row["commit"] == commit], f"rows predicted at {commit}"))
    return lines


def compare(name: str, row: Row) -> dict[str, Any]:
    """A row of the record."""
    about: dict[str, Any] = {
        "name": name, "on": row.on, "measured": row.measured, "of": row.of, "fitted": "yes" if row.fitted else "",
        "note": row.note, "source": row.source, "error": None, "percent": "–",
    }  # fmt: skip
    print(f"compiling {name} for {row.on} ...", flush=True)
    unit, plan = planned(row, row.config)
    predicted, how = plan.get(row.of), settings(row.config)
    if row.other is not None and predicted is not None:
        # seconds add up, so half-way is the harmonic mean of rates
        predicted = statistics.harmonic_mean([predicted, planned(row, row.other)[1][row.of]])
        how += f", half-way to remat {getattr(row.other.model, 'remat', 'none')}"
    about |= {
        "unit": "MFU, attention in full" if row.of == "mfu" else f"{unit}/s a device",
        "settings": how, "predicted": predicted, "binds": plan.get("binds"),
        "peak": plan["memory"]["peak"] / 2**30, "fits": plan["fits"], "plan": plan,
    }  # fmt: skip
    if predicted is not None:
        error = predicted / row.measured - 1
        about |= {"error": error, "percent": f"{error:+.1%}"}
    return about


def planned(row: Row, cfg: Config) -> tuple[str, dict[str, Any]]:
    """What a step counts, and its plan on the row's hardware."""
    made = compiling.compiled(cfg, topology.parse(row.on))
    return made.unit, figures.figures(cfg, changed(made, row.hardware))


def changed(made: compiling.Compiled, factors: Sequence[tuple[str, float]]) -> compiling.Compiled:
    """A compiled step on hardware whose fields are multiplied by these factors."""
    hardware = made.topology.hardware
    for name, factor in factors:
        value = getattr(hardware, name)
        value = {key: one * factor for key, one in value.items()} if isinstance(value, dict) else value * factor
        hardware = dataclasses.replace(hardware, **{name: value})
    where = dataclasses.replace(made.topology, hardware=hardware)
    return dataclasses.replace(made, topology=where, places=dataclasses.replace(made.places, topology=where))


def settings(cfg: Config) -> str:
    """Batch, length, mesh and what is computed again."""
    mesh = " ".join(f"{axis}={size}" for axis, size in vars(cfg.mesh).items() if isinstance(size, int) and size > 1)
    length = f" x {cfg.data.seq_len}" if cfg.task.answers == "continuation" else ""
    again = getattr(cfg.model, "remat", "none")
    again += ", layers unrolled" if getattr(cfg.model, "unroll", 1) > 1 else ""
    accumulate = f", accumulate {cfg.train.accumulate}" if cfg.train.accumulate > 1 else ""
    return f"batch {cfg.data.batch_size}{length}{accumulate}, {mesh}, remat {again}"
