"""Describe an attention kernel: what it computes, what it refuses, and how it runs on a mesh.

Each kernel equals `xla`, the reference, or refuses the call by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import jax

from jaxmodels.errors import UserError, nearest
from jaxmodels.fields import Named
from jaxmodels.registry import Registry, instance_of

FEATURES: Mapping[str, str] = {
    "causal": "a query sees no later key",
    "window": "causal, and only the last `window` keys",
    "two-sided window": "`window` without `causal`: keys nearer than `window` on either side",
    "segment_ids": "a query sees only keys of its own segment",
    "bias": "added to the scores, with its gradient",
    "scale": "a scale other than 1/sqrt(K)",
    "grouped heads": "fewer heads of keys than of queries",
    "dropout": "of the attention weights",
    "softcap": "scores as softcap·tanh(scores/softcap)",
    "q_offset": "the first query's position as an integer",
    "q_offset array": "the first query's position as an array, one for each row or for all",
    "kv_length": "the number of valid keys, one for each row or for all",
    "float32": "inputs in float32 (all kernels take bfloat16)",
}
"""What a call can ask for besides plain attention in bfloat16."""

EVERYTHING = frozenset(FEATURES)


class Call(NamedTuple):
    """What a kernel is chosen by: the dims of q (B, T, H, K) and k (B, S, G, K), and the features asked for."""

    B: int
    T: int
    S: int
    H: int
    G: int
    K: int
    dtype: str = "float32"
    features: frozenset[str] = frozenset()
    offset: int = 0
    pieces: int = 1
    """Into how many pieces the mesh cuts tokens."""
    shares: int = 1
    """Into how many shares the mesh cuts heads."""
    capability: tuple[int, ...] = ()
    """Compute capability of the NVIDIA GPU that it is for; of other devices none."""


def loop(trips: float) -> str:
    """A scope's name for a loop whose length is known only at run time: it states how often the body should run."""
    return f"trips[{trips:.12g}]"


def branch(share: float) -> str:
    """A scope's name for a condition that only devices know: it states how often its dearest branch should be taken."""
    return f"share[{share:.12g}]"


class Attend(Protocol):
    """A kernel's function: attention of q (B, T, H, K) over k and v (B, S, G, K); returns (B, T, H, K).

    Shapes: bias (B or 1, H or 1, T or 1, S or 1); segments (B, T) and (B, S); q_offset an integer or (B or 1,);
    kv_length (B or 1,). Where a mesh cuts tokens, kernels of the partition `tokens` are also given `axis`, its axes.
    """

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: bool,
        window: int | None,
        segments: tuple[jax.Array, jax.Array] | None,
        bias: jax.Array | None,
        scale: float,
        dropout: float,
        rng: jax.Array | None,
        softcap: float | None,
        q_offset: int | jax.Array,
        kv_length: jax.Array | None,
    ) -> jax.Array: ...


Choose = Callable[[Call], Attend]
"""The function of the kernel that `auto` takes for a call."""


def no_reason(*_: Any) -> None:
    """The answer of a kernel that has nothing to refuse."""
    return None


@dataclass(frozen=True)
class Kernel:
    """A kernel of attention.

    One from outside this package is `Kernel(attend, features)` in a module of its own, and is asked for as
    `package.module:name`; `auto` takes none but the built-in ones.
    """

    attend: Callable[..., Any]
    """The function, with the signature of `Attend`; it may ignore what its features exclude."""
    features: frozenset[str]
    """The features that it supports."""
    refuses: Callable[[Call], str | None] = no_reason
    """Why it cannot compute a call whose features it supports; None if it can."""
    absent: Callable[[str], str | None] = no_reason
    """Why it cannot run on a platform (cpu, gpu, tpu), or with what is installed; None if it can."""
    preferred: Callable[[Call, str, int], str | None] = no_reason
    """Why `auto` takes it for a call, on a platform, spread over a number of devices; None if it does not."""
    partition: Literal["compiler", "rows", "tokens"] = "rows"
    """On a mesh: left to XLA's partitioner; run on each device's own rows and heads; or on its own tokens too."""
    uncut: frozenset[str] | None = None
    """If it joins the tokens of several devices: the features that it supports where no tokens are sharded."""
    bind: Callable[[Call, Choose], Attend] | None = None
    """Makes the function for a call, if it depends on more than arrays and options; without it, `attend` is used."""

    def __post_init__(self) -> None:
        for name in self.features:
            if name not in FEATURES:
                raise UserError(
                    f"got kernel feature {name!r}, expected some of {', '.join(FEATURES)}{nearest(name, FEATURES)}"
                )

    def refusal(self, call: Call) -> str | None:
        """Why the kernel cannot compute a call, or None if it can."""
        supported = self.uncut if self.uncut is not None and call.pieces == 1 else self.features
        missing = [name for name in FEATURES if name in call.features - supported]
        return f"does not support {', '.join(missing)}" if missing else self.refuses(call)

    def absence(self, platform: str) -> str | None:
        """Why the kernel cannot run here, or None if it can."""
        return self.absent(platform)

    def function(self, call: Call, choose: Choose) -> Attend:
        """The function for a call."""
        return self.attend if self.bind is None else self.bind(call, choose)


BUILTIN = ("xla", "blockwise", "cudnn", "splash", "tokamax", "ring", "ulysses")
"""The kernels of this package, a module each; the reference first."""

KERNELS = Registry(
    "attention kernel",
    "jaxmodels.kernels",
    {name: f"jaxmodels.models.kernels.{name}:KERNEL" for name in BUILTIN},
    instance_of(Kernel, "mine = Kernel(attend, features)"),
)

Attention = Annotated[str, Named(KERNELS, also=("auto",))]
"""A config's field for the kernel of attention."""


def kernel_of(name: str) -> Kernel:
    """The kernel of that name, or of `package.module:name`.

    Raises:
        UserError: there is none.
    """
    return KERNELS.find(name)


def feature_table() -> str:
    """Features and the built-in kernels that support them, as a Markdown table."""
    kernels = {name: kernel_of(name) for name in BUILTIN}
    lines = ["| feature | " + " | ".join(kernels) + " |", "| --- |" + " :-: |" * len(kernels)]
    for name, meaning in FEATURES.items():
        cells = ["yes" if name in kernel.features else "–" for kernel in kernels.values()]
        lines.append(f"| **{name}**: {meaning} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
