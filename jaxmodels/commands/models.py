"""`jaxmodels models [NAME]`: families and presets, or one model's parameters."""

from __future__ import annotations

from typing import Any


def models(name: str | None = None, /) -> None:
    """List families and presets with their sizes, or one model's tree of parameters.

    FLOPs are those of a forward pass, per token (at a context of at most 2,048) or per example.

    Args:
        name: a preset or a family, such as llama3-8b.
    """
    import jax

    from jaxmodels import hf
    from jaxmodels.models import flops
    from jaxmodels.models.families import create, list_models

    jax.config.update("jax_platforms", "cpu")  # only shapes are needed: do not look for accelerators
    if name is None:
        readable = hf.supported()
        print(f"{'':27s}{'parameters':>17s}   FLOPs forward")
        for family, presets in list_models().items():
            kinds = ", ".join(readable.get(family, ()))
            print(f"{family}{kinds and f' (weights in and out: {kinds})'}")
            for preset in presets:  # print each as soon as it is known
                model = flops.countable(create(preset))
                print(f"  {preset:25s}{model.count():>17,}   {forward_flops(model)}", flush=True)
        return
    model = create(name)
    axes = dict(jax.tree_util.tree_leaves_with_path(model.axes(), is_leaf=lambda x: isinstance(x, tuple)))
    print(model.config)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.shapes()):
        dims = "  ".join(f"{axis}={size}" for axis, size in zip(axes[path], leaf.shape, strict=True))
        print(f"  {jax.tree_util.keystr(path, simple=True, separator='/'):24s} {dims}")
    print(f"{model.count():,} parameters")


def forward_flops(model: Any) -> str:
    """Format the FLOPs of a forward pass."""
    import numpy as np

    from jaxmodels.models import flops

    if not np.issubdtype(model.inputs(1)[0].dtype, np.integer):
        return f"{flops.forward(model, 1):.3g} per example"
    length = min(getattr(model.config, "context", 2048), 2048)
    return f"{flops.forward(model, 1, length) / length:.3g} per token, T={length:,}"
