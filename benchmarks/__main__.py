"""`python -m benchmarks NAME [options]`: a benchmark is a module beside this file with `Options` and `run(options)`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from jaxmodels.errors import UserError, nearest

BENCHMARKS = {
    "attention": "attention kernels over sequence lengths: time, memory, error",
    "step": "a training step through the engine against a bare jitted step and other frameworks",
    "families": "every family against its PyTorch reference: forward and train step",
    "resume": "a run killed, told to stop, damaged and out of disk ends in the same bits",
    "startup": "time to import, and to say that an option is mistyped",
    "data": "training on real data against synthetic batches",
    "loader": "images and tokens from files: against tf.data and torch's DataLoader",
    "quality": "configs of real data trained to their end: what they reach on the test split",
    "planning": "seconds and memory of plans for thousands of devices, on this machine",
    "published": "the plan against throughput that others measured and published",
    "measured": "the plan against the same jobs on the GPU that is here",
    "weights": "import and export of a model of 1 GB: seconds and memory",
}
"""One line of help for each module."""


def main(argv: Sequence[str]) -> int:
    """Run one benchmark, and return the exit code."""
    usage = "\n".join(
        ["usage: python -m benchmarks NAME [options]; NAME --help shows its options", ""]
        + [f"  {name:<12} {text}" for name, text in BENCHMARKS.items()]
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    name, *rest = argv
    try:
        if name not in BENCHMARKS:
            raise UserError(
                f"got benchmark {name!r}, expected one of {', '.join(BENCHMARKS)}{nearest(name, BENCHMARKS)}"
            )
        import tyro

        module = importlib.import_module(f"benchmarks.{name}")
        module.run(
            tyro.cli(module.Options, prog=f"python -m benchmarks {name}", description=BENCHMARKS[name], args=rest)
        )
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
