"""Where a run reports its metrics: each `Logger` is one place, besides metrics.jsonl and the terminal."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.registry import Registry, function_of, subclass_of

if TYPE_CHECKING:
    from jaxmodels.config import Config
    from jaxmodels.train.display import Display
    from jaxmodels.train.metrics import Record
    from jaxmodels.train.sections import Metrics

log = logging.getLogger("jaxmodels")

_EVENTS_SECONDS = 30  # how far a running TensorBoard may lag behind


class Logger:
    """A place that a run's metrics are reported to. Override the methods you need; by default each does nothing.

    One object is created per run, without arguments and in the main process only. If a method raises, the failure
    is logged once and the run continues without this logger.
    """

    package: ClassVar[str] = ""
    """Name of a module that it imports and that may not be installed; `extra` is the extra of this package with it."""
    extra: ClassVar[str] = ""

    def start(self, run: Path, config: Config, step: int) -> None:
        """Begin to report on a run directory.

        A resumed run is at a `step` above 0. Steps beyond it may have been reported before, by a run that was killed;
        they will be reported again.
        """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step, named as in train/loss. A step may come twice, with other names."""

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Take images that a generative model generated after `step` steps, as uint8 (N, H, W, C)."""

    def flush(self) -> None:
        """Write out what has been reported so far: a checkpoint is about to be saved."""

    def close(self) -> None:
        """Finish: the run has ended, normally or with an error."""


def _unfit(found: Any) -> str:
    """Say what is wrong with a logger's class, which is called without arguments; empty if nothing is."""
    return subclass_of(Logger)(found) or function_of()(found)


LOGGERS = Registry(
    "logger",
    "jaxmodels.loggers",
    {
        "tensorboard": "jaxmodels.train.loggers:TensorBoard",
        "wandb": "jaxmodels.train.trackers:WandB",
        "mlflow": "jaxmodels.train.trackers:MLflow",
        "prometheus": "jaxmodels.train.trackers:Prometheus",
    },
    _unfit,
)


class Report:
    """Passes everything that a run reports on to its record (metrics.jsonl), the terminal and its loggers."""

    def __init__(self, record: Record | None, display: Display, loggers: Mapping[str, Logger] | None = None) -> None:
        """`record` is None in all processes except the main one."""
        self.record, self.display, self.loggers = record, display, dict(loggers or {})

    def start(self, run: Path, config: Config, step: int) -> None:
        """Start the loggers."""
        self._each(lambda logger: logger.start(run, config, step))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Report the values of a step; steps never decrease."""
        if self.record is not None:
            self.record.scalars(step, values)
        self.display.scalars(step, values)
        # copied, so that no logger can change what the others get
        self._each(lambda logger: logger.scalars(step, dict(values)))

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Report images to the loggers."""
        self._each(lambda logger: logger.images(step, name, images.copy()))

    def flush(self) -> None:
        """Flush every line to the disk, so that a checkpoint never lacks the line of its step."""
        if self.record is not None:
            self.record.flush()
        self._each(lambda logger: logger.flush())

    def close(self) -> None:
        """Close the record and the loggers."""
        if self.record is not None:
            self.record.close()
        self._each(lambda logger: logger.close())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self.loggers.items()):
            if not guarded(name, lambda logger=logger: call(logger)):
                del self.loggers[name]


def guarded(name: str, call: Callable[[], Any]) -> bool:
    """Run a logger's code and return whether it worked. A failure is only logged: no report is worth a run."""
    try:
        call()
    except (Exception, SystemExit) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        log.error("logger %s failed (%s); the run continues without it, metrics.jsonl has everything", name, message)
        return False
    return True


def find_loggers(section: Metrics) -> dict[str, Callable[[], Logger]]:
    """Find the classes named in `metrics.loggers`, and the one of `metrics.prometheus`.

    Raises:
        UserError: there is no such logger, it is not a subclass of `Logger`, or the package that it needs is not there.
    """
    found: dict[str, Callable[[], Logger]] = {}
    for name in section.loggers:
        if name in found:
            raise UserError(f"got metrics.loggers {name} twice, expected each name once, try --metrics.loggers {name}")
        if name == "prometheus":
            raise UserError("got metrics.loggers prometheus, expected its port alone, try --metrics.prometheus 9100")
        found[name] = _with_package(f"metrics.loggers {name}", LOGGERS.find(name))
    if section.prometheus is not None:
        what = f"metrics.prometheus {section.prometheus}"
        found["prometheus"] = _with_package(what, LOGGERS.find("prometheus"))
    return found


def _with_package(what: str, kind: type[Logger]) -> type[Logger]:
    if kind.package and importlib.util.find_spec(kind.package) is None:
        extra = f"jaxmodels[{kind.extra}]" if kind.extra else kind.package
        raise UserError(f"got {what}, expected the package {kind.package} to be installed, try pip install '{extra}'")
    return kind


def opened(classes: Mapping[str, Callable[[], Logger]]) -> dict[str, Logger]:
    """Create the loggers of a run, leaving out those that fail."""
    found: dict[str, Logger] = {}
    for name, make in classes.items():
        guarded(name, lambda name=name, make=make: found.update({name: make()}))
    return found


class TensorBoard(Logger):
    """Writes events for TensorBoard to the run's folder `tensorboard`.

    They are written synchronously, because tensorboardX's own thread dies when the disk is full and then hangs the run.
    """

    def __init__(self) -> None:
        self.file: Any = None
        self.flushed = 0.0

    def start(self, run: Path, config: Config, step: int) -> None:
        self.folder, self.first = run / "tensorboard", step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, lambda summary: [summary.scalar(name, value) for name, value in values.items()])

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        shape = "NHWC"
        self._write(step, lambda summary: [summary.image(name, images, dataformats=shape)])

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()
            self.flushed = time.monotonic()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _write(self, step: int, summaries: Callable[[Any], Iterable[Any]]) -> None:
        # tensorboardX imports torch where it is installed, which costs a second and 200 MB for nothing used here
        blocked = "torch" not in sys.modules
        if blocked:
            sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

            if self.file is None:
                self.folder.mkdir(exist_ok=True)
                self.file = EventsWriter(str(self.folder / "events"))
                if self.first:
                    # TensorBoard discards what a killed run wrote beyond the checkpoint
                    again = SessionLog(status=SessionLog.START)
                    self.file.write_event(Event(wall_time=time.time(), step=self.first + 1, session_log=again))
            for each in summaries(summary):
                self.file.write_event(Event(wall_time=time.time(), step=step, summary=each))
        finally:
            if blocked:
                del sys.modules["torch"]
        if time.monotonic() - self.flushed > _EVENTS_SECONDS:
            self.flush()
