"""`jaxmodels config explain RUN [FIELD]`: the values of fields and where they come from."""

from __future__ import annotations

from pathlib import Path

from jaxmodels import config as configs
from jaxmodels.errors import UserError, nearest, printable


def explain(source: str, field: str | None = None, /) -> None:
    """Show a field's value, what it means, and where the value came from.

    Args:
        source: a run directory or a config file.
        field: its dotted name, such as optim.peak_lr, or that of a section; all fields when not given.
    """
    if Path(source).is_file():
        cfg, origin = configs.load(source), {"file": source, "overrides": []}
    else:
        cfg, origin = configs.read(source)
    values = configs.flatten(cfg)
    wanted = field.replace("-", "_").removeprefix("__") if field else None
    chosen = [name for name in values if wanted is None or name == wanted]
    chosen = chosen or [name for name in values if name.startswith(f"{wanted}.")]
    if wanted is not None and not chosen:
        raise UserError(f"got field {field!r}, expected one such as optim.peak_lr{nearest(wanted, values)}")
    for name in chosen:
        print(printable(f"{name} = {values[name]!r}  ({configs.provenance(cfg, name, origin)})"))
        if wanted:
            print(f"  {configs.documentation(cfg, name)}")
