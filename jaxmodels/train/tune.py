"""Search for good config fields: many runs, of which the poor ones stop early (Optuna)."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import math
import os
import shlex
import sqlite3
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax

from jaxmodels import config as configs
from jaxmodels.config import Config
from jaxmodels.errors import UserError, nearest
from jaxmodels.parallel import progress
from jaxmodels.train import directory
from jaxmodels.train import run as runs
from jaxmodels.train.loop import NotFinite
from jaxmodels.train.space import TuneOptions

STARTUP = 5
"""Trials that run to the end before others are compared with the median at the same step."""
DATABASE = "study.db"
_HEARTBEAT = 30
_REFUSED = "refused"


@dataclass(frozen=True)
class Choice:
    """One field and the values it may have: a range of numbers, or a list."""

    field: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    values: tuple[Any, ...] = ()

    def draw(self, trial: Any) -> Any:
        """Draw a value with the study's sampler."""
        if self.values:
            return self.values[trial.suggest_categorical(self.field, list(range(len(self.values))))]
        if self.whole:
            return trial.suggest_int(self.field, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.field, self.low, self.high, log=self.log)

    def shown(self, params: dict[str, Any]) -> Any:
        """Return the value among a trial's parameters, as a person writes it."""
        value = params[self.field]
        return self.values[value] if self.values else value


def parse_space(space: Sequence[str], cfg: Config) -> list[Choice]:
    """Parse all choices of a search; refuse none, and two of the same field."""
    if not space:
        raise UserError("got no --space, expected fields to choose, try --space optim.peak_lr=1e-4:1e-1:log")
    choices = [parse_choice(text, cfg) for text in space]
    for name, count in Counter(choice.field for choice in choices).items():
        if count > 1:
            raise UserError(f"got --space for {name} {count} times, expected each field once, try one of them")
    return choices


def parse_choice(text: str, cfg: Config) -> Choice:
    """Parse FIELD=LOW:HIGH, FIELD=LOW:HIGH:log or FIELD=A,B,C and check it against the config.

    Raises:
        UserError: there is no such field, or it cannot have these values.
    """
    name, equals, wanted = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    known = configs.flatten(cfg)
    if section := configs.meant_kind(cfg, name, wanted.split(",")[0].strip()):
        raise UserError(f"got --space {text!r}, expected kinds of the section, try {section}={wanted}")
    if name not in known or not equals:
        raise UserError(
            f"got --space {text!r}, expected FIELD=LOW:HIGH, FIELD=LOW:HIGH:log or FIELD=A,B,C"
            f"{nearest(name, known) or ', try optim.peak_lr=1e-4:1e-1:log'}"
        )
    if name in (sections := dict(configs.with_kinds(cfg))):
        kinds = [kind.strip() for kind in wanted.split(",")]
        for kind in kinds:
            configs.of_kind(sections[name], kind)
        return Choice(name, values=tuple(kinds))
    owner: Any = cfg
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    hint = get_type_hints(type(owner))[last]
    kinds = {kind for kind in (hint, *get_args(hint)) if isinstance(kind, type)}
    low, colon, rest = wanted.partition(":")
    if not colon:
        return Choice(name, values=tuple(_value(item.strip(), hint, kinds, text) for item in wanted.split(",")))
    high, _, scale = rest.partition(":")
    try:
        numbers = float(low), float(high)
    except ValueError:
        numbers = math.nan, math.nan
    if not numbers[0] < numbers[1] or scale not in ("", "log") or not kinds & {int, float}:
        raise UserError(f"got --space {text!r}, expected numbers from low to high, try {name}=1:10 or {name}=1:10:log")
    if scale and numbers[0] <= 0:
        raise UserError(f"got --space {text!r}, expected a low end above 0 for log, try {name}={low}:{high}")
    return Choice(name, *numbers, log=scale == "log", whole=float not in kinds)


def _value(text: str, hint: Any, kinds: set[type], whole: str) -> Any:
    allowed = [v for v in get_args(hint) if isinstance(v, str)]
    if allowed and text not in allowed:
        raise UserError(
            f"got {text!r} in --space {whole!r}, expected one of {', '.join(allowed)}{nearest(text, allowed)}"
        )
    if text in ("True", "False") and bool in kinds:
        return text == "True"
    if text == "None" and type(None) in kinds:
        return None
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in kinds or allowed:
        return text
    raise UserError(f"got {text!r} in --space {whole!r}, expected a value of {hint}, try a range or another field")


def search(cfg: Config, options: TuneOptions, file: str, argv: Sequence[str]) -> Path:
    """Run the remaining trials of a study, here and in the given number of workers; return its directory.

    Each trial is a run directory below `trials/`, and `study.db` (SQLite) records them. Values are drawn by TPE
    (Bergstra et al. 2011). A trial stops early if its metric is worse than the median of the others at that step.
    A combination of values that is invalid counts as a trial, with its reason in the study.

    Raises:
        UserError: there is nothing to choose, the existing study is of another search, or no combination was valid.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError("got no package optuna, expected it for tune, try pip install 'jaxmodels[tune]'") from error

    choices = parse_space(options.space, cfg)
    out = Path(options.out or f"runs/{Path(file).stem}-tune")
    check_free(out)
    (out / "trials").mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # the heartbeat, multivariate TPE
    with _nothing_left(out):
        study = optuna.create_study(
            storage=storage(out),
            study_name="tune",
            direction="minimize" if cfg.eval.lowest else "maximize",
            # no two workers draw the same; each resumed one goes on elsewhere
            sampler=optuna.samplers.TPESampler(seed=(cfg.train.seed + 7919 * os.getpid()) % 2**31, multivariate=True),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
            load_if_exists=True,
        )
    facts = {"space": list(options.space), "metric": cfg.eval.metric}
    before = {name: study.user_attrs.get(name, value) for name, value in facts.items()}
    if before != facts:
        raise UserError(
            f"got a study in {out} of another search ({before}), expected the same search, try another --out"
        )
    for name, value in facts.items():
        study.set_user_attr(name, value)

    given = overrides(argv[1:], [choice.field for choice in choices])

    def objective(trial: Any) -> float:
        drawn = [(choice.field, choice.draw(trial)) for choice in choices]
        drawn.sort(key=lambda pair: pair[0].count("."))  # a section's kind before its fields

        def watch(step: int, metrics: dict[str, float]) -> bool:
            value = metrics.get(cfg.eval.metric)
            if value is None:
                return False
            finite = math.isfinite(value)
            if finite:
                trial.report(value, step)
            poor.append(not finite or trial.should_prune())
            return poor[-1]

        poor: list[bool] = []

        where = out / "trials" / f"{trial.number:04d}"
        origin = {"file": file, "overrides": given + [f"--{c.field}={c.shown(trial.params)}" for c in choices]}
        values = " ".join(f"{c.field}={_short(c.shown(trial.params))}" for c in choices)

        def refused(reason: str) -> Any:
            """Record an invalid combination as the worst trial; the search continues."""
            trial.set_user_attr(_REFUSED, reason)
            print(f"trial {trial.number}: refused: {reason}  {values}", flush=True)
            return optuna.TrialPruned(reason)

        try:
            chosen = functools.reduce(lambda cfg, field: configs.replaced(cfg, *field), drawn, cfg)
            _, result = runs.train(chosen, where, "never", origin, watch=watch)
        except NotFinite as error:
            print(f"trial {trial.number}: {error}  {values}", flush=True)
            raise optuna.TrialPruned from error
        except UserError as error:
            raise refused(str(error)) from error
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise refused("it does not fit into the device's memory") from error
        if result.progress.best is not None:
            trial.set_user_attr("best_step", result.progress.best_step)
        ended = "stopped early" if any(poor) else result.ended
        print(
            f"trial {trial.number}: {cfg.eval.metric} {_short(result.progress.best)} ({ended})  {values}",
            flush=True,
        )
        if result.ended == "preempted":
            if any(poor):
                raise optuna.TrialPruned
            raise KeyboardInterrupt  # told to stop: the search ends, and a later one replaces this trial
        if result.progress.best is None:
            raise refused(f"its evaluations gave no {cfg.eval.metric}")
        return result.progress.best

    # trials that other workers are running count too, or each worker would start one too many
    counted = (*_ended(), optuna.trial.TrialState.RUNNING)
    with _joined(study, out):
        others = [
            subprocess.Popen([sys.executable, "-m", "jaxmodels", "tune", *argv, "--workers", "1"])
            for _ in range(options.workers - 1)
        ]
        try:
            if len(study.get_trials(deepcopy=False, states=counted)) < options.trials:
                limit = optuna.study.MaxTrialsCallback(options.trials, states=counted)
                study.optimize(objective, callbacks=[limit])
        except BaseException:
            for process in others:
                process.terminate()
            raise
        finally:
            for process in others:
                _await(process)
    reasons = [trial.user_attrs.get(_REFUSED) for trial in study.get_trials(deepcopy=False, states=_ended())]
    if reasons and all(reasons):
        raise UserError(f"got {len(reasons)} trials, all refused, the last because: {reasons[-1]}")
    return out


def check_free(out: Path) -> None:
    """Refuse, before any work, a directory that is no place for a search, such as that of a run.

    Raises:
        UserError: it cannot be written, or it holds a run, which another process may be writing.
    """
    directory.check_writable(out, "--out")
    if (out / "config.json").exists():
        raise UserError(
            f"got --out {out}, which holds a run, expected a directory for the search alone, try --out {out}-tune"
        )


def _await(process: subprocess.Popen[bytes]) -> None:
    """Wait for another worker, and report progress meanwhile, so that a supervisor does not take this one for stuck."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            return
        progress.poll()


@contextmanager
def _nothing_left(out: Path) -> Iterator[None]:
    """A disk that is too full for a new study keeps no part of it, which would be none to go on with."""
    new = not (out / DATABASE).exists()
    try:
        yield
    except Exception as error:
        if new and "full" in str(error):
            for file in out.glob(f"{DATABASE}*"):
                file.unlink()
            for folder in (out / "trials", out):
                with suppress(OSError):  # not empty
                    folder.rmdir()
        raise


def storage(out: Path) -> Any:
    """Open the database of a study by its path, because ?, % and braces have a meaning in a URL."""
    import optuna
    from sqlalchemy.pool import QueuePool

    connect = functools.partial(sqlite3.connect, out / DATABASE, timeout=60, check_same_thread=False)
    return optuna.storages.RDBStorage(
        "sqlite://",
        engine_kwargs={"creator": connect, "poolclass": QueuePool},
        heartbeat_interval=_HEARTBEAT,
        grace_period=4 * _HEARTBEAT,
    )


def overrides(arguments: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Return the arguments that a search passes on to its runs: without its own options and the fields it chose."""
    own = {field.name for field in dataclasses.fields(TuneOptions)} | {"run_dir", "resume"} | set(fields)
    kept, keep = [], True
    for argument in arguments:
        if argument.startswith("--"):
            keep = argument[2:].partition("=")[0].replace("-", "_") not in own
        if keep:
            kept.append(argument)
    return kept


def train_command(file: str, argv: Sequence[str], chosen: Mapping[str, Any]) -> str:
    """Return the command that trains with the arguments of a run or a search, and the chosen values besides."""
    words = ["jaxmodels", "train", file, *overrides(argv[1:], list(chosen))]
    for field, value in chosen.items():
        words += [f"--{field.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _ended() -> tuple[Any, ...]:
    """The states of trials that count. A failed trial was interrupted and does not count."""
    from optuna.trial import TrialState

    return TrialState.COMPLETE, TrialState.PRUNED


@contextmanager
def _joined(study: Any, out: Path) -> Iterator[None]:
    """Join the processes of a study; one that is alone there marks interrupted trials as failed."""
    from optuna.trial import TrialState

    with (out / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # others are running; if one dies, its heartbeat stops
        else:
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                study.tell(trial.number, state=TrialState.FAIL)
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def read_trials(cfg: Config, options: TuneOptions, out: Path) -> list[dict[str, Any]]:
    """Return a study's trials that count: number, value (None if there is none), pruned, seconds, and each field."""
    import optuna

    choices = parse_space(options.space, cfg)
    study = optuna.load_study(study_name="tune", storage=storage(out))
    found = []
    for trial in study.get_trials(deepcopy=False, states=_ended()):
        pruned = trial.state == optuna.trial.TrialState.PRUNED
        values = list(trial.intermediate_values.values())
        best = (min if cfg.eval.lowest else max)(values) if pruned and values else trial.value
        seconds = trial.duration.total_seconds() if trial.duration else math.nan
        row = {"number": trial.number, "value": best, "pruned": pruned, "seconds": seconds}
        found.append(row | {c.field: c.shown(trial.params) for c in choices if c.field in trial.params})
    return found


def ranking(cfg: Config, options: TuneOptions, trials: Sequence[dict[str, Any]], rows: int = 10) -> str:
    """Format the best trials as a table, best first; trials that stopped early come after all others."""
    fields = [choice.field for choice in parse_space(options.space, cfg)]
    sign = 1 if cfg.eval.lowest else -1
    known = [trial for trial in trials if trial["value"] is not None]
    ranked = sorted(known, key=lambda trial: (trial["pruned"], sign * trial["value"]))
    titles = ["trial", cfg.eval.metric, *fields, "seconds", ""]
    cells = [
        [
            str(trial["number"]),
            _short(trial["value"]),
            *(_short(trial.get(field)) for field in fields),
            f"{trial['seconds']:.0f}",
            "stopped early" if trial["pruned"] else "",
        ]
        for trial in ranked[:rows]
    ]
    widths = [max(len(row[i]) for row in (titles, *cells)) for i in range(len(titles))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (titles, *cells)
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
