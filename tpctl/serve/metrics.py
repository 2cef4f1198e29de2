"""What a server counts, in Prometheus' form.

Counting happens for every token, so it is a few additions; what the engines count is asked for when somebody looks.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from tpctl.wire.report import EngineStats

if TYPE_CHECKING:
    from tpctl.serve.generation import Generation

_TTFT = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
_ITL = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_WHOLE = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 1200.0)


class Histogram:
    """Counts of values up to each of some bounds, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def metric(self, name: str, what: str) -> Metric:
        found = HistogramMetricFamily(name, what)
        self.add_to(found)
        return found

    def add_to(self, family: HistogramMetricFamily, *labels: str) -> None:
        """``labels``: the values of the family's."""
        total, buckets = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, self._sum)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self._answers: Counter[tuple[str, int]] = Counter()
        self._ends: Counter[str] = Counter({"stop": 0, "length": 0, "tool_calls": 0, "abort": 0, "error": 0})
        self._first = Histogram(_TTFT)
        self._between = Histogram(_ITL)
        self._whole: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(_WHOLE))

    def begun(self, generation: Generation, since: float) -> None:
        """A request has come; ``since`` as of ``time.monotonic``."""
        generation.arrived = [-since] * len(generation.arrived)

    def arrived(self, generation: Generation, at: int, count: int, now: float) -> None:
        """So many tokens of an answer have come."""
        self.generated_tokens += count
        before = generation.arrived[at]
        generation.arrived[at] = now
        if before > 0:
            self._between.observe((now - before) / count, count)
        elif before < 0:  # minus the time at which it was asked for
            self._first.observe(now + before)

    def ended(self, finish_reason: str) -> None:
        """An answer has ended; "abort": nobody wants it any more."""
        self._ends[finish_reason] += 1

    def answered(self, path: str, status: int, since: float) -> None:
        """A request has been answered whole. How long refusals take says nothing of answers."""
        self._answers[path, status] += 1
        if status == 200:
            self._whole[path].observe(time.monotonic() - since)

    def exposition(self, stats: Mapping[int, EngineStats], held: int) -> bytes:
        """All of it as text.

        Args:
            stats: of each engine that tells them, by its number.
            held: requests that they have.
        """
        registry = CollectorRegistry()
        registry.register(_Collected([*self._own(held), *_of_engines(stats)]))
        return generate_latest(registry)

    def _own(self, held: int) -> list[Metric]:
        answers = CounterMetricFamily("tpctl_http_requests", "Requests answered.", labels=("path", "status"))
        for (path, status), count in sorted(self._answers.items()):
            answers.add_metric((path, str(status)), count)
        ends = CounterMetricFamily("tpctl_answers", "Answers by how they ended.", labels=("finish_reason",))
        for reason, count in self._ends.items():
            ends.add_metric((reason,), count)
        said = "From a request to the end of its answer, of status 200."
        whole = HistogramMetricFamily("tpctl_http_request_seconds", said, labels=("path",))
        for path, histogram in sorted(self._whole.items()):
            histogram.add_to(whole, path)
        return [
            answers,
            ends,
            GaugeMetricFamily("tpctl_requests_open", "Requests that engines have, waiting ones included.", value=held),
            CounterMetricFamily("tpctl_prompt_tokens", "Tokens of prompts taken in.", value=self.prompt_tokens),
            CounterMetricFamily("tpctl_generated_tokens", "Tokens of answers.", value=self.generated_tokens),
            self._first.metric("tpctl_time_to_first_token_seconds", "From a request to its first token."),
            self._between.metric("tpctl_inter_token_seconds", "Between two tokens of an answer."),
            whole,
        ]


class _Collected(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _of_engines(stats: Mapping[int, EngineStats]) -> list[Metric]:
    """One sample an engine, by its number."""
    gauges: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
        "requests_running": ("Requests that hold KV blocks.", lambda one: one.running),
        "requests_waiting": ("Requests that wait for KV blocks.", lambda one: one.waiting),
        "kv_blocks": ("KV blocks.", lambda one: one.num_blocks),
        "kv_cache_usage_ratio": (
            "Share of the KV blocks that requests hold.",
            lambda one: 1 - one.free_blocks / max(one.num_blocks, 1),
        ),
    }
    counters: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
        "steps": ("Steps computed.", lambda one: one.steps),
        "held_steps": ("Steps launched shortly before the one before was to end.", lambda one: one.held_steps),
        "late_steps": ("Those of them behind its end, or hardly before it.", lambda one: one.late_steps),
        "preemptions": ("Requests that gave up their KV blocks.", lambda one: one.preemptions),
        "prefix_cache_queried_tokens": (
            "Prompt tokens looked for in the prefix cache.",
            lambda one: one.prefix_cache_queried_tokens,
        ),
        "prefix_cache_hit_tokens": ("Those that were there.", lambda one: one.prefix_cache_hit_tokens),
    }
    found: list[Metric] = []
    for kind, family in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
        for name, (what, value) in kind.items():
            metric = family(f"tpctl_{name}", what, labels=("engine",))
            for number, one in stats.items():
                metric.add_metric((str(number),), value(one))
            found.append(metric)
    return found
