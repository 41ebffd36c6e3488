"""Which parameters of a run are held as codes, and how: the section `compress` of a config."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import jax

from jaxmodels.compress.codes import RANGES, Spec, axes_of, layout, quantize
from jaxmodels.compress.patterns import matched
from jaxmodels.errors import UserError
from jaxmodels.fields import Range, Section
from jaxmodels.models.coded import Activations, Kind, is_coded
from jaxmodels.models.model import Model
from jaxmodels.models.parameters import Axes
from jaxmodels.registry import Registry

COMPRESSIONS = Registry(
    "compress",
    "jaxmodels.compressions",
    {
        "quantized": "jaxmodels.compress.coding:Quantized",
        "rounded": "jaxmodels.compress.rounded:Rounded",
        "sparse": "jaxmodels.compress.sparse:Sparse",
    },
)
_KINDS = ("matrix", "embedding")


@dataclass(frozen=True)
class CompressConfig(Section, section="compress", kinds=COMPRESSIONS):
    """How a run holds its parameters."""

    def specs(self, networks: Mapping[str, Model]) -> dict[str, Spec]:
        """Return how parameters are coded, by network and path; those that are not coded are left out."""
        return {}

    def trained(self, optimizer: Any, steps: int, axes: Mapping[str, Any], updates: int = 1) -> Any:
        """Return the optimizer of a network whose parameters have these logical axes, over a run of so many steps."""
        return optimizer

    def check(self, adapter: bool, ema: float | None) -> None:
        """Refuse a config that also has an adapter, or averages of the parameters.

        Raises:
            UserError: it cannot be.
        """


@dataclass(frozen=True)
class CodesConfig(CompressConfig):
    """Which parameters have codes. Patterns are of paths below the network, such as layers/attn/q/w."""

    codes: Kind = "int8"
    """int8; int4, two a byte; float8 (E4M3); or nf4, the 16 values of QLoRA (Dettmers et al. 2023), two a byte."""
    group: Annotated[int, Range(2, 2**20)] | None = None
    """Inputs that share a scale, such as 32, 64 or 128. None: all inputs of an output."""
    symmetric: bool = True
    """Whether the codes lie around 0; otherwise int8 and int4 have a zero point beside each scale."""
    targets: tuple[str, ...] = ("*",)
    """Patterns of the matrices that are coded: *, */mlp/*, layers/attn/q/w."""
    embeddings: tuple[str, ...] = ()
    """Patterns of embeddings and output layers that are coded too: embed, head."""
    kept: tuple[str, ...] = ()
    """Patterns of parameters that stay as they are."""

    def __post_init__(self) -> None:
        if not self.symmetric and self.codes not in RANGES:
            raise UserError(
                f"got compress.symmetric False for {self.codes}, which has no zero points, expected int8 or int4, "
                "try --compress.codes int4"
            )

    @property
    def spec(self) -> Spec:
        """How each of them is coded."""
        return Spec(self.codes, self.group, self.symmetric)

    def chosen(self, names: Mapping[str, Axes], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return those that have codes, of parameters by network and path.

        Raises:
            UserError: a pattern matches nothing that it could, or a parameter cannot be coded so.
        """
        every, of = list(names), {kind: [name for name in names if names[name].kind == kind] for kind in _KINDS}
        chosen = {
            *matched("compress.targets", self.targets, every, of["matrix"], "matrix"),
            *matched("compress.embeddings", self.embeddings, every, of["embedding"], "embedding"),
        } - {*matched("compress.kept", self.kept, every, every, "parameter")}
        for name in sorted(chosen):
            try:
                layout(shapes[name], names[name], self.spec)
            except UserError as error:
                path = name.partition("/")[2]
                message = str(error).replace("a parameter", path, 1)
                raise UserError(message.replace("with its path", f"'{path.removesuffix('/w')}'")) from None
        return [name for name in names if name in chosen]


@dataclass(frozen=True)
class Quantized(CodesConfig):
    """Parameters as codes of few bits with scales. Patterns are of paths below the network, such as layers/attn/q/w."""

    factors: bool = False
    """Whether each input has a factor beside the scales, as `jaxmodels compress` finds it by AWQ and SmoothQuant."""
    activations: Activations | None = None
    """Products of int8 codes with inputs in int8 too: dynamic, by the largest number of each row, or static, by a scale
    that `jaxmodels compress RUN smoothquant` has measured. None: inputs stay as they are."""

    def __post_init__(self) -> None:
        if self.activations and (self.codes != "int8" or self.group is not None or not self.symmetric):
            how = ("" if self.group is None else f" in groups of {self.group}") + (
                "" if self.symmetric else " with zeros"
            )
            raise UserError(
                f"got compress.activations {self.activations} beside {self.codes}{how}, expected symmetric int8 with "
                "one scale for each output, try --compress.activations None"
            )
        if (self.activations or self.factors) and self.embeddings:
            raise UserError(
                "got compress.embeddings beside compress.factors or compress.activations, which matrices alone have, "
                "expected one of them, try without --compress.embeddings"
            )
        super().__post_init__()

    @property
    def spec(self) -> Spec:
        return Spec(self.codes, self.group, self.symmetric, self.factors, self.activations)

    def specs(self, networks: Mapping[str, Model]) -> dict[str, Spec]:
        shapes = {
            f"{network}/{_path(path)}": leaf.shape
            for network, model in networks.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes())
        }
        return dict.fromkeys(self.chosen(named(networks), shapes), self.spec)


@dataclass(frozen=True)
class Coding:
    """Which parameters of a task's networks are coded, and how."""

    networks: Mapping[str, Model]
    chosen: Mapping[str, Spec]
    """By network and path: model/layers/attn/q/w."""

    def encode(self, params: Any) -> Any:
        """Return parameters, by network, with the chosen ones coded by round-to-nearest."""
        return self._mapped(lambda name, w: quantize(w, self._names[name], self.chosen[name]), params)

    def shapes(self) -> Any:
        """Return the shapes of the parameters, by network."""
        return self._mapped(
            lambda name, w: layout(w.shape, self._names[name], self.chosen[name]),
            {name: network.shapes() for name, network in self.networks.items()},
        )

    def axes(self, of: Any = None) -> Any:
        """Return the logical axes of the parameters, by network; `of` is that tree, or a part of it, without codes."""
        whole = {name: network.axes() for name, network in self.networks.items()} if of is None else of
        shapes = dict(jax.tree_util.tree_leaves_with_path(self.shapes(), is_leaf=is_coded))
        layouts = {_path(path): leaf for path, leaf in shapes.items()}
        return self._mapped(lambda name, names: axes_of(names, layouts[name]), whole)

    def _mapped(self, one: Callable[[str, Any], Any], tree: Any) -> Any:
        def each(path: tuple[Any, ...], leaf: Any) -> Any:
            return one(_path(path), leaf) if _path(path) in self.chosen and not is_coded(leaf) else leaf

        return jax.tree_util.tree_map_with_path(each, tree, is_leaf=lambda x: isinstance(x, tuple) or is_coded(x))

    @functools.cached_property
    def _names(self) -> dict[str, Axes]:
        return named(self.networks)


def coding(section: CompressConfig | None, networks: Mapping[str, Model]) -> Coding | None:
    """Return which parameters of networks a config holds as codes; None if it holds none so.

    Raises:
        UserError: a pattern matches nothing that it could, or a parameter cannot be coded so.
    """
    specs = {} if section is None else section.specs(networks)
    return Coding(networks, specs) if specs else None


def named(networks: Mapping[str, Model]) -> dict[str, Axes]:
    """Return the logical axes of all parameters by network and path."""
    return {
        f"{network}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for network, model in networks.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.axes(), is_leaf=lambda x: isinstance(x, tuple))
    }


def leaves_of(axes: Any) -> tuple[dict[str, Axes], Any]:
    """Return the logical axes of one network's parameters by name, as patterns match them, and the tree's structure."""
    leaves, form = jax.tree_util.tree_flatten_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    return {f"network/{_path(path)}": leaf for path, leaf in leaves}, form


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
