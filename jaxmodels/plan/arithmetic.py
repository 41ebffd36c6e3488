"""Guesses of a step's memory and time from shapes alone: rough, but quick enough for thousands of candidates.

They only decide which candidates are worth compiling; every figure of a plan comes from the compiled program.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmodels.config import Config, Mesh
from jaxmodels.errors import UserError
from jaxmodels.plan import roofline
from jaxmodels.plan.roofline import Places, passes
from jaxmodels.plan.topology import Topology

if TYPE_CHECKING:  # jax is imported when a guess is made
    from jaxmodels.train.job import Job

KNOBS = {"remat": "none", "attention": "auto", "unroll": 1}
"""Fields that decide how a model is computed, and the behavior of a model without them."""
BLOCK = 0.6
"""Share of the activations of a block's backward pass that is in memory at a time."""
_ROWS = 10007
"""A batch size that divides no other dimension, so that arrays that grow with the batch can be told apart."""


@dataclass(frozen=True)
class Guess:
    """Guess of a step's cost on a device, in bytes and seconds."""

    kept: float
    """Parameters, optimizer, average and gradients."""
    arguments: float
    """The same without gradients, which need not all be in memory at once: a lower bound."""
    activations: float
    least: float
    """Lower bound on the seconds of any schedule: the products, or the traffic of one link."""
    seconds: float

    @property
    def peak(self) -> float:
        return self.kept + self.activations


@dataclass(frozen=True)
class Saved:
    """Bytes that are saved for the backward pass: for each row of the batch, and independent of the batch."""

    rows: float
    rows_cut: float
    """The part of them that `tensor` shards as well."""
    weights: float
    """Copies of parameters in the compute dtype, unsharded."""
    weights_cut: float
    hosted: float = 0.0
    """Bytes for each row that are saved in host memory."""


class Arithmetic:
    """Guesses the cost of candidates for one experiment on one topology."""

    def __init__(self, cfg: Config, topology: Topology) -> None:
        import jax

        from jaxmodels.parallel import rules

        self.cfg, self.topology = cfg, topology
        job = _job(cfg)
        self.task, self.shapes = job.task, _unplaced(job.layout)
        self.updates = self.task.updates
        self.frozen = {**self.shapes.frozen, **self.shapes.teacher}
        self.axes = [{}, self.task.axes()] if job.adapter is None else [*job.adapter.axes()]
        """Of frozen and of trained parameters; a list, since a tuple would be the axes of one."""
        if job.teaching is not None:
            self.axes[0] = {**self.axes[0], "teacher": job.teaching.axes()}
        self.copies = _bytes(self.shapes.opt_state) / _bytes(self.shapes.params) + (cfg.train.ema is not None)
        leaves = jax.tree.leaves((self.frozen, self.shapes.params))
        self.parameters = [(leaf.shape, names) for leaf, names in zip(leaves, _names(self.axes), strict=True)]
        self.sizes = [leaf.size * leaf.dtype.itemsize / 4 for leaf in leaves]
        """Of the parameters: their elements, of which a code of eight bits counts as a quarter."""
        self.trained = job.trained() / sum(self.sizes)
        """Share of the parameters that have gradients and moments."""
        self.logical = {name for _, names in self.parameters for name in names if name}
        self.length = max(self.task.lengths(), default=1)
        """Tokens of a row; 1 if the batch has no tokens."""
        self.vocabulary = max([s[n.index("vocab")] for s, n in self.parameters if "vocab" in n], default=0)
        self.width = 2 if getattr(cfg.model, "dtype", "float32") == "bfloat16" else 4
        self.layers = max([s[n.index("layers")] for s, n in self.parameters if "layers" in n], default=1)
        self.wide = self._sizes(lambda axes: rules.RULES["mlp"][0] in axes)
        counted = job.flops()
        self.model_flops, self.attention_flops = counted.model, counted.attention
        self.visible = counted.attention - counted.model + counted.visible
        self.rules = rules
        self.traced: dict[tuple[str, str], Saved] = {}

    def on(self, topology: Topology) -> Arithmetic:
        """The same experiment on another topology."""
        other = copy.copy(self)
        other.topology = topology
        return other

    def _sizes(self, chosen: Any) -> set[int]:
        """Sizes that only dimensions sharded over the chosen mesh axes have."""
        from jaxmodels.parallel.rules import RULES

        found: dict[bool, set[int]] = defaultdict(set)
        for shape, names in self.parameters:
            for size, name in zip(shape, names, strict=True):
                found[bool(name) and chosen(RULES[name])].add(size)
        return found[True] - found[False]

    @functools.cache
    def place(self, mesh: Any) -> dict[str, int]:
        """Sizes of a mesh's axes.

        Raises:
            UserError: the mesh does not divide a parameter, a row of tokens or the batch.
        """
        from jax.sharding import AbstractMesh

        from jaxmodels.data.contract import check_lengths
        from jaxmodels.parallel import mesh as meshes

        sizes = meshes.sizes(mesh, self.topology.devices)
        check_lengths(self.task.fields, sizes)
        abstract: Any = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        for axes, shapes in zip(self.axes, (self.frozen, self.shapes.params), strict=True):
            if shapes:
                self.rules.shardings_of(abstract, axes, shapes)
        return sizes

    @functools.cache
    def shares(self, mesh: Any) -> tuple[float, float]:
        """Number of parameters that a device holds, and that it has after gathering over fsdp."""
        sizes, fsdp = self.place(mesh), self.rules.RULES["embed"][0]
        own = gathered = 0.0
        for size, (_, names) in zip(self.sizes, self.parameters, strict=True):
            axes = [axis for name in names if name for axis in self.rules.rules_of(sizes)[name]]
            own += size / self.rules.shards(sizes, axes)
            if fsdp in axes:
                gathered += size / self.rules.shards(sizes, [axis for axis in axes if axis != fsdp])
        return own, gathered

    def saved(self, remat: str, kernel: str) -> Saved:
        """Bytes saved for the backward pass; `kernel` is the attention kernel."""
        if (remat, kernel) not in self.traced:
            try:
                self.traced[remat, kernel] = self._trace(remat, kernel)
            except UserError:  # only the reference kernel computes this model's attention
                self.traced[remat, kernel] = self._trace(remat, "xla")
        return self.traced[remat, kernel]

    def _trace(self, remat: str, kernel: str) -> Saved:
        import jax

        from jaxmodels.models.adapted import join

        wanted = {"remat": remat, "attention": kernel}
        model = dataclasses.replace(self.cfg.model, **{k: v for k, v in wanted.items() if hasattr(self.cfg.model, k)})
        job = _job(dataclasses.replace(self.cfg, model=model))
        spec = {name: jax.ShapeDtypeStruct((_ROWS, *x.shape[1:]), x.dtype) for name, x in job.batch.items()}
        found, hosted = [0.0, 0.0, 0.0, 0.0], 0.0
        given = {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((self.frozen, self.shapes.params, spec))}
        for loss in job.task.losses:

            def residuals(params: Any, frozen: Any, stats: Any, batch: Any, loss: Any = loss) -> Any:
                def total(trained: Any) -> Any:
                    every = join(frozen, {**params, loss.trains: trained})
                    return loss.fn(every, stats, batch, jax.random.key(0), jax.numpy.int32(0))

                return jax.vjp(total, params[loss.trains], has_aux=True)[1]

            state = (self.shapes.params, self.frozen, self.shapes.stats)
            for leaf in jax.tree.leaves(jax.eval_shape(residuals, *state, spec)):
                if (leaf.shape, leaf.dtype) in given:
                    continue
                if remat == "offload" and leaf.shape[:2] == (self.layers, _ROWS):  # the inputs of all blocks
                    hosted += _bytes(leaf) / _ROWS
                    continue
                rows = any(size and size % _ROWS == 0 for size in leaf.shape)
                cut = any(size in self.wide for size in leaf.shape)
                found[2 * (not rows) + cut] += _bytes(leaf) / (_ROWS if rows else 1)
        rows, rows_cut, weights, weights_cut = found
        return Saved(rows, rows_cut, weights, weights_cut, hosted)

    def guess(self, cfg: Config) -> Guess:
        """Guess the cost of a config's step.

        Raises:
            UserError: the config does not fit its mesh.
        """
        from jaxmodels.tasks import losses
        from jaxmodels.train.job import check_batch_size

        sizes = self.place(cfg.mesh)
        check_batch_size(sizes, cfg.data.batch_size, cfg.train.accumulate, cfg.train.strategy, updates=self.updates)
        batch = self.rules.shards(sizes, self.rules.rules_of(sizes)["batch"])
        tensor = sizes[self.rules.RULES["mlp"][0]]
        pieces = self.rules.shards(sizes, self.rules.RULES["seq"]) if self.length > 1 else 1
        whole = tensor if self.rules.SEQUENCE in sizes else 1
        rows = cfg.data.batch_size / batch / pieces
        own, gathered = self.shares(cfg.mesh)
        remat, attention, unroll = (getattr(cfg.model, name, default) for name, default in KNOBS.items())
        kernel = "xla" if attention == "xla" else "blockwise"  # all other kernels save what `blockwise` saves
        saved, everything = self.saved(remat, kernel), self.saved("none", kernel)

        def of_rows(kept: Saved, whole: int = whole) -> float:
            return kept.rows / whole + kept.rows_cut / tensor

        ticks, idle = self._ticks(cfg, sizes)
        parts = rows / cfg.train.accumulate
        block = BLOCK * of_rows(everything, 1) / self.layers  # inside a block tokens are gathered
        activations = parts * (idle * of_rows(saved) + (block if remat != "none" else 0))
        activations += saved.weights + saved.weights_cut / tensor
        activations += 4 * self.vocabulary / tensor * min(parts * self.length, losses.SCORED)  # logits of a chunk
        activations += (
            4 * own * self.trained * (cfg.train.accumulate > 1)
        )  # accumulated gradients, beside those of a microbatch
        kept = 4 * own * (1 + self.trained * (1 + self.copies))
        compute, least = (idle * seconds for seconds in self._products(remat, kernel))
        times = ticks * cfg.train.accumulate
        links = self._links(sizes, rows, gathered, own, remat, times)
        row, share = self.topology.hardware, roofline.shares(self.topology.hardware)
        traffic = 3 * rows * of_rows(everything) + 4 * own * (2 + self.trained * (1 + 3 * self.copies))
        traffic += 3 * times * self.width * (gathered or own)
        # a scan copies what its backward pass needs to a stacked array and back
        traffic += 2 * rows * of_rows(saved) * (1 - min(unroll, self.layers) / self.layers)
        away = 2 * rows * saved.hosted / whole  # to the host and back
        memory = (traffic + away) / (row.bandwidth * share["memory"])
        if away and row.host:  # transfers to the host overlap with compute
            memory += max(0.0, away / (row.host * share["link"]) - 0.8 * compute)
        hidden = max(0.0, links["parameters"] - 0.8 * compute)  # gathers overlap with compute
        return Guess(
            kept=kept,
            arguments=4 * own * (1 + self.trained * self.copies),
            activations=activations,
            least=max(least, links["least"]),
            seconds=compute + memory + links["activations"] + hidden,
        )

    def _products(self, remat: str, kernel: str) -> tuple[float, float]:
        """Seconds of products and attention with recomputation, and of the products alone without it."""
        row, share = self.topology.hardware, roofline.shares(self.topology.hardware)
        peak = self.topology.devices * row.flops.get(getattr(self.cfg.model, "dtype", "float32"), row.flops["bfloat16"])
        plain = (self.model_flops - self.attention_flops) / (peak * share["products"])
        if kernel == "xla":  # scores are ordinary products, computed in full and saved
            scores = self.attention_flops / (peak * share["products"]) * (1 if remat == "none" else 4 / 3)
        else:  # only visible pairs, but the backward pass recomputes the scores
            shown = self.visible / (peak * share["attention"])
            scores = shown * (7 / 6 if remat == "none" else 9 / 6)
        # a block's last product is not recomputed
        return plain * (1.25 if remat in ("full", "offload") else 1) + scores, plain

    def _ticks(self, cfg: Config, sizes: dict[str, int]) -> tuple[int, float]:
        """Ticks of the pipeline for each accumulated microbatch, and the factor by which its bubble lengthens the step.

        Raises:
            UserError: the rows do not divide into the pipeline's microbatches.
        """
        from jaxmodels.models import pipeline

        stages = self.rules.Stages.of(sizes)
        if stages.stages == 1:
            return 1, 1.0
        rows, shards = cfg.data.batch_size // cfg.train.accumulate, self.rules.shards(sizes, self.rules.RULES["batch"])
        count = pipeline.microbatches(stages, rows, shards)
        if count is None:
            raise UserError(f"got {rows} rows for {stages.stages} stages of {shards} shards, expected a multiple")
        ticks = count * stages.rounds + stages.stages - 1
        return ticks, ticks / (count * stages.rounds)

    def _links(
        self, sizes: dict[str, int], rows: float, gathered: float, own: float, remat: str, times: int
    ) -> dict[str, float]:
        """Seconds of collectives for parameters and for activations in a step, and a lower bound for any one link."""
        table = self.rules.RULES
        fsdp, tensor, context = table["embed"][0], table["mlp"][0], table["seq"][0]
        gather = self.seconds(sizes, fsdp, "all-gather", self.width * gathered)
        once = self.seconds(sizes, self.rules.DATA, "all-reduce", self.width * own)
        # devices of one expert group replicate the rest of the model
        rest = sum(
            math.prod(shape) / self.rules.shards(sizes, [axis for name in names if name for axis in table[name]])
            for shape, names in self.parameters
            if "expert" not in names
        )
        reduced = self.seconds(sizes, table["expert"][0], "all-reduce", self.width * rest)
        again = 1 if remat == "none" else 2
        # all-reduces of a block: of each product whose inputs `tensor` shards, and of the input gradients of the others
        stream = rows * self.length * self.width
        sums = 0.0
        for shape, names in self.parameters:
            before = names[: names.index("embed")] if "embed" in names and "vocab" not in names else ()
            if any(name and tensor in table[name] for name in before):
                depth = math.prod(s for s, n in zip(shape, names, strict=True) if n == "layers")
                sums += depth * stream * shape[names.index("embed")]
        added = self.seconds(sizes, tensor, "all-reduce", sums)
        keys = sum(
            math.prod(shape) / shape[names.index("embed")]
            for shape, names in self.parameters
            if "embed" in names and "head_dim" in names and names.index("embed") < names.index("head_dim")
        )
        # keys and values of whole sequences go around the ring once forward, and back with their gradients
        around = self.seconds(sizes, context, "all-gather", rows * self.length * keys * self.width * sizes[context])
        experts = 0.0
        if "expert" in self.logical:
            inputs = max(s[n.index("embed")] for s, n in self.parameters if "expert" in n and "embed" in n)
            sent = self.layers * self.cfg.model.dispatched() * stream * inputs
            # dispatch and combine: forward, again if that is recomputed, and backward
            experts = (2 + 2 * again) * self.seconds(sizes, table["expert"][0], "all-to-all", sent)
        stages, embed = (
            self.rules.STAGE,
            max([s[n.index("embed")] for s, n in self.parameters if "embed" in n], default=1),
        )
        # each stage receives all rows, passes them on, and passes their gradients back
        handed = 2 * self.seconds(sizes, stages, "collective-permute", sizes[stages] * stream * embed)
        return {
            "parameters": times * (2 * gather + reduced) + once + 3 * around,
            "activations": added * (2 if remat == "none" else 3) + experts + handed,
            "least": max(2 * gather, reduced, once, 2 * added),
        }

    def seconds(self, sizes: dict[str, int], axis: str, kind: str, size: float) -> float:
        """Seconds of a collective of `size` bytes along a mesh axis, with devices in their natural order."""
        devices = sizes[axis]
        if devices == 1 or not size:
            return 0.0
        rate = self.rate(tuple(sizes.items()), axis)
        return size * passes(kind, devices) / rate

    @functools.cache
    def rate(self, sizes: tuple[tuple[str, int], ...], axis: str) -> float:
        """Bytes a second that a device sends through the link that a mesh axis crosses."""
        names, shape = zip(*sizes, strict=True)
        where = np.arange(self.topology.devices).reshape(shape)
        group = np.moveaxis(where, names.index(axis), 0).reshape(shape[names.index(axis)], -1)[:, 0]
        _, rate = Places(self.topology, dict(sizes), self.topology.coordinates()).link([group.tolist()])
        return rate * roofline.shares(self.topology.hardware)["link"]


def _job(cfg: Config) -> Job:
    """Assemble the job on one device: shapes are those of any mesh, which candidates differ in."""
    import jax

    from jaxmodels.train.job import assemble

    return assemble(dataclasses.replace(cfg, mesh=Mesh()), jax.devices()[:1], opened=False)


def _unplaced(tree: Any) -> Any:
    """Shapes and dtypes without shardings."""
    import jax

    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _bytes(tree: Any) -> float:
    """Bytes of a tree of unsharded arrays."""
    import jax

    return float(
        sum(
            math.prod(leaf.shape)
            * (8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended) else leaf.dtype.itemsize)
            for leaf in jax.tree.leaves(tree)
        )
    )


def _names(axes: Any) -> list[tuple[str | None, ...]]:
    import jax

    return jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
