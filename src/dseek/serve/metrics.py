"""`Metrics`: what Prometheus may read, in a registry of its own.

Gauges of the engine are read when somebody asks, so they cost nothing between. Paths are counted by route, never by
what a client typed, so that no stranger can make new series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)


class Metrics:
    """Counters and histograms of one server.

    Args:
        model: name for the label `model_name`.
        engine_stats: gives the engine's statistics, or None where there is no engine in this process.
    """

    def __init__(self, model: str, engine_stats: Callable[[], Any] | None = None) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        names = ("model_name",)
        self._requests = Counter(
            "dseek_http_requests", "Requests answered.", ("route", "status"), registry=self.registry
        )
        self._in_flight = Gauge("dseek_http_requests_in_flight", "Requests in work.", registry=self.registry)
        self._first = self._histogram("dseek_time_to_first_token_seconds", "Request to first token.", _SECONDS)
        self._between = self._histogram("dseek_inter_token_latency_seconds", "Time between tokens.", _SECONDS)
        self._whole = self._histogram("dseek_e2e_request_latency_seconds", "Request to last token.", _SECONDS)
        self._prompt_length = self._histogram("dseek_request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer_length = self._histogram("dseek_request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._finished = Counter(
            "dseek_request_success", "Answers by how they ended.", (*names, "finished_reason"), registry=self.registry
        )
        if engine_stats is not None:
            self.registry.register(_EngineCollector(model, engine_stats))

    def request_began(self) -> None:
        """Count a request that is in work now."""
        self._in_flight.inc()

    def request_ended(self, route: str, status: int) -> None:
        """Count a request that was answered.

        Args:
            route: the route's pattern.
            status: of HTTP; 499 where the client left.
        """
        self._in_flight.dec()
        self._requests.labels(route=route, status=str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """Note how long a first token took.

        Args:
            seconds: since the request arrived.
        """
        self._first.observe(seconds)

    def between_tokens(self, seconds: float) -> None:
        """Note the time between two pieces of an answer.

        Args:
            seconds: for a token.
        """
        self._between.observe(seconds)

    def answered(self, *, prompt_tokens: int, answer_tokens: int, seconds: float, reason: str) -> None:
        """Note an answer that ended.

        Args:
            prompt_tokens: length of its prompt.
            answer_tokens: its own length.
            seconds: since the request arrived.
            reason: stop, length, tool_calls or abort.
        """
        self._prompt_length.observe(prompt_tokens)
        self._answer_length.observe(answer_tokens)
        self._whole.observe(seconds)
        self._finished.labels(model_name=self._model, finished_reason=reason).inc()

    def text(self) -> bytes:
        """Write everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Any:
        made = Histogram(name, what, ("model_name",), buckets=buckets, registry=self.registry)
        return made.labels(model_name=self._model)


class _EngineCollector:
    """Reads the engine's statistics when a scrape asks."""

    def __init__(self, model: str, stats: Callable[[], Any]) -> None:
        self._model = model
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's gauges and counters."""
        stats = self._stats()
        used = 1 - stats.free_pages / stats.num_pages if stats.num_pages else 0.0
        for name, what, value in (
            ("dseek_num_requests_running", "Requests that are being computed.", stats.running),
            ("dseek_num_requests_waiting", "Requests that wait for a place or for pages.", stats.waiting),
            ("dseek_cache_usage_ratio", "Share of the cache's pages in use.", used),
            ("dseek_cache_reusable_pages", "Pages that a later prompt can use.", stats.cached_pages),
            ("dseek_tokens_per_second", "New tokens a second over the last ten seconds.", stats.tokens_s),
            ("dseek_engine_up", "1 while the engine works.", 0 if stats.error else 1),
        ):
            gauge = GaugeMetricFamily(name, what, labels=("model_name",))
            gauge.add_metric((self._model,), value)
            yield gauge
        for name, what, value in (
            ("dseek_generation_tokens", "Tokens sampled.", stats.generated_tokens),
            ("dseek_prefill_rows", "Rows of prompts computed.", stats.prefill_rows),
            ("dseek_prefix_cache_saved_tokens", "Prompt tokens found in the prefix cache.", stats.saved_tokens),
            ("dseek_num_preemptions", "Requests that gave their pages to another.", stats.preemptions),
            ("dseek_engine_steps", "Steps of the engine.", stats.steps),
            ("dseek_spec_decode_num_draft_tokens", "Tokens guessed.", stats.drafted_tokens),
            ("dseek_spec_decode_num_accepted_tokens", "Guessed tokens that were right.", stats.accepted_tokens),
        ):
            counter = CounterMetricFamily(name, what, labels=("model_name",))
            counter.add_metric((self._model,), value)
            yield counter
