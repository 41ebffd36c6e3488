"""`python -m benchmarks NAME [options]`: a benchmark is a module beside this file with `Options` and `run(options)`, or
any `package.module:run` of such a kind."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import get_type_hints

from jaxmodels.errors import UserError
from jaxmodels.registry import Registry

BENCHMARKS = {
    "suite": "what this hardware can be measured by, on one page, and the gates",
    "attention": "attention kernels in the field's axes: TFLOP/s, GB/s, shares of peak, memory, error",
    "device": "all that needs an accelerator, in the order of worth, within so many seconds",
    "step": "a training step through the engine against a bare jitted step and other frameworks",
    "scaling": "a training step over numbers of devices and mesh axes, measured beside its plan",
    "exact": "FLOPs, bytes, memory and collectives of steps as compiled, held to their records",
    "compare": "whether a training step has become slower between two commits, by turns of both",
    "families": "every family against its PyTorch reference: forward and train step",
    "resume": "a run killed, told to stop, damaged and out of disk ends in the same bits",
    "faults": "jobs on a SLURM of two hosts under faults at random: each is named, and the bits stay the same",
    "startup": "time to import, and to say that an option is mistyped",
    "data": "training on real data against synthetic batches",
    "loader": "images and tokens from files: against tf.data and torch's DataLoader",
    "quality": "configs of real data trained to their end: what they reach on the test split",
    "planning": "seconds and memory of plans for thousands of devices, on this machine",
    "published": "the plan against throughput that others measured and published",
    "measured": "the plan against the same jobs on the GPU that is here",
    "serve": "a language model over HTTP against transformers, and a classifier against its bare function",
    "weights": "import and export of a model of 1 GB: seconds and memory",
}
"""One line of help for each module."""
FOUND = Registry("benchmark", "jaxmodels.benchmarks", {name: f"benchmarks.{name}:run" for name in BENCHMARKS})
"""The function that runs each, here or in another package; its parameter `options` is what it takes."""


def main(argv: Sequence[str]) -> int:
    """Run one benchmark, and return the exit code."""
    usage = "\n".join(
        ["usage: python -m benchmarks NAME [options]; NAME --help shows its options", ""]
        + [f"  {name:<12} {BENCHMARKS.get(name, '')}".rstrip() for name in FOUND.names()]
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(usage)
        return 0 if argv else 2
    name, *rest = argv
    try:
        run = FOUND.find(name)
        from jaxmodels.commands.parsing import parse

        about = BENCHMARKS.get(name) or (run.__doc__ or "").partition("\n")[0]
        found = run(parse(get_type_hints(run)["options"], rest, f"python -m benchmarks {name}", about=about))
        code = found if isinstance(found, int) else 0  # others return what they wrote, or nothing
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        code = 2
    if (distributed := sys.modules.get("jaxmodels.parallel.distributed")) is not None:
        code = distributed.finalize(code)  # several processes leave together
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
