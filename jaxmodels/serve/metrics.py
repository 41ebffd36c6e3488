"""Metrics in Prometheus' format: those of vLLM by its names, which dashboards know, and our own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from jaxmodels.generate.engine import Engine
from jaxmodels.serve.batches import Batches, Classifier

if TYPE_CHECKING:
    from jaxmodels.serve.watch import Watch

SOON = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_compiled = 0


def compilations() -> int:
    """How many programs this process has compiled, or read from the compilation cache, since it was first asked."""
    _listen()
    return _compiled


@functools.cache
def _listen() -> None:
    def heard(event: str, *_: Any, **__: Any) -> None:
        global _compiled
        _compiled += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(heard)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        compilations()
        make = functools.partial(Histogram, registry=self.registry)
        self.first = make("vllm:time_to_first_token_seconds", "Time to the first token.", buckets=SOON)
        self.between = make("vllm:inter_token_latency_seconds", "Time between two tokens of an answer.", buckets=SOON)
        self._whole = make("vllm:e2e_request_latency_seconds", "Time of a whole answer.", buckets=SOON)
        self._read = make("vllm:request_prompt_tokens", "Tokens of prompts.", buckets=LENGTHS)
        self._made = make("vllm:request_generation_tokens", "Tokens of answers.", buckets=LENGTHS)
        self._done = Counter("vllm:request_success", "Answers.", ["finished_reason"], registry=self.registry)
        self._requests = Counter(
            "jaxmodels:http_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )

    def watch(
        self,
        engines: Callable[[], Sequence[tuple[str, Engine]]],
        batches: Callable[[], Sequence[tuple[str, Batches]]],
    ) -> None:
        """Tell what these do, by their models' names."""
        self.registry.register(_Models(engines, batches))

    def done(self, reason: str, seconds: float, read: int, made: int) -> None:
        """Count an answer."""
        self._done.labels(reason).inc()
        self._whole.observe(seconds)
        self._read.observe(read)
        self._made.observe(made)

    def request(self, path: str, status: int) -> None:
        """Count a request by the path of its endpoint."""
        self._requests.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self.registry)


class _Models:
    """Reads what models do at the moment of a scrape."""

    def __init__(self, engines: Callable[[], Any], batches: Callable[[], Any]) -> None:
        self.engines, self.batches = engines, batches

    def collect(self) -> Iterator[Any]:
        engines = self.engines()

        def told(family: Any, about: Any, read: Callable[[Any], float]) -> Any:
            for model, each in about:
                family.add_metric([model], read(each))
            return family

        def gauge(name: str, about: str, read: Callable[[Engine], float]) -> Any:
            return told(GaugeMetricFamily(name, about, labels=["model_name"]), engines, read)

        def counter(name: str, about: str, read: Callable[[Any], float], of: Any = engines) -> Any:
            return told(CounterMetricFamily(name, about, labels=["model_name"]), of, read)

        yield gauge("vllm:num_requests_running", "Texts that have a row.", lambda e: len(e.running))
        yield gauge("vllm:num_requests_waiting", "Texts that wait for one.", lambda e: len(e.waiting))
        yield gauge("vllm:kv_cache_usage_perc", "Share of the cache's pages that are held.", lambda e: e.pages.use)
        yield counter("vllm:prefix_cache_queries", "Tokens of prompts.", lambda e: e.totals.sought_tokens)
        yield counter("vllm:prefix_cache_hits", "Those that another text had.", lambda e: e.totals.shared_tokens)
        yield counter("vllm:num_preemptions", "Texts that gave way to others.", lambda e: e.totals.preemptions)
        yield counter("vllm:prompt_tokens", "Tokens of prompts that were read.", lambda e: e.totals.prompt_tokens)
        yield counter("vllm:generation_tokens", "Tokens that were drawn.", lambda e: e.totals.new_tokens)
        yield counter("vllm:spec_decode_num_draft_tokens", "Tokens that were guessed.", lambda e: e.totals.guessed)
        yield counter("vllm:spec_decode_num_accepted_tokens", "Those that were right.", lambda e: e.totals.right)
        yield counter("jaxmodels:steps", "Steps of all rows by a token each, or more.", lambda e: e.totals.steps)
        of = self.batches()
        yield counter("jaxmodels:batches", "Batches of classifiers and encoders.", lambda b: b.calls, of)
        yield counter("jaxmodels:batch_rows", "Rows in them, without padding.", lambda b: b.rows, of)
        yield from _drift([(model, b.watch) for model, b in of if isinstance(b, Classifier) and b.watch is not None])
        compiled = CounterMetricFamily("jaxmodels:compilations", "Programs that were compiled in this process.")
        compiled.add_metric([], compilations())
        yield compiled


def _drift(watches: Sequence[tuple[str, Watch]]) -> Iterator[Any]:
    """What the last windows of classifiers are like beside their references."""
    windows = CounterMetricFamily("jaxmodels:drift_windows", "Windows that were compared.", labels=["model_name"])
    alarms = CounterMetricFamily("jaxmodels:drift_alarms", "Those with an alarm.", labels=["model_name"])
    of = ["model_name", "what"]
    value = GaugeMetricFamily("jaxmodels:drift_value", "The statistic or distance of the last window.", labels=of)
    p = GaugeMetricFamily("jaxmodels:drift_p_value", "Its p-value, corrected for the number of tests.", labels=of)
    alarm = GaugeMetricFamily("jaxmodels:drift_alarm", "Whether it raises an alarm.", labels=of)
    for model, watch in watches:
        windows.add_metric([model], watch.windows)
        alarms.add_metric([model], watch.alarms)
        for test in watch.tests:
            value.add_metric([model, test.name], test.value)
            p.add_metric([model, test.name], test.corrected)
            alarm.add_metric([model, test.name], float(test.alarm))
    yield from (windows, alarms, value, p, alarm)
