"""Counts and times for Prometheus: what the server has seen, and what the engine holds when asked."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

TYPE = "text/plain; version=0.0.4; charset=utf-8"
FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
SLOW = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

GAUGES = {
    "running": ("atma_requests_running", "Texts that are read or written now"),
    "waiting": ("atma_requests_waiting", "Texts that wait for a place"),
    "memory_bytes": ("atma_memory_budget_bytes", "Bytes that requests, states and steps may take"),
    "used_bytes": ("atma_memory_used_bytes", "Bytes in use of that budget"),
    "recorded_bytes": ("atma_recorded_bytes", "Bytes of recorded steps"),
    "kept_bytes": ("atma_cache_bytes", "Bytes of kept states and their pages"),
    "kept_states": ("atma_cache_states", "Kept states in memory"),
    "files": ("atma_cache_files", "Kept states on disk"),
    "file_bytes": ("atma_cache_file_bytes", "Bytes of kept states on disk"),
    "pending_bytes": ("atma_cache_pending_bytes", "Bytes of kept states that are on their way to disk"),
    "adapters": ("atma_adapters", "Adapters on the model"),
    "adapter_bytes": ("atma_adapter_bytes", "Bytes of adapters"),
    "pages": ("atma_pages", "Pages of keys and values"),
    "pages_free": ("atma_pages_free", "Pages that nobody uses"),
}
COUNTERS = {
    "queries": ("atma_cache_queries", "Texts whose beginning was looked for among kept states"),
    "cache_hits": ("atma_cache_hits", "Texts whose beginning was found"),
    "cached_tokens": ("atma_cache_saved_tokens", "Tokens that were not read because a kept state had read them"),
    "evictions": ("atma_cache_evictions", "Kept states that had to go"),
    "files_dropped": ("atma_cache_drops", "Kept states that the disk was too slow for"),
    "file_failures": ("atma_cache_file_failures", "Kept states that could not be written"),
    "requests": ("atma_engine_requests", "Requests that the engine took"),
    "read": ("atma_prompt_tokens_read", "Tokens read"),
    "written": ("atma_tokens_written", "Tokens written"),
    "drafts": ("atma_spec_decode_num_drafts", "Drafts of what a text says again"),
    "draft_tokens": ("atma_spec_decode_num_draft_tokens", "Tokens of these"),
    "accepted_tokens": ("atma_spec_decode_num_accepted_tokens", "Tokens of these that were right"),
    "steps": ("atma_engine_steps", "Steps of the engine"),
    "preemptions": ("atma_preemptions", "Times that a text gave way to others"),
    "failures": ("atma_failures", "Answers that could not be finished"),
}


class Metrics:
    """One server's; nothing is shared between servers of a process. `model`: the label of all but the process's and of
    requests of an adapter, which have its name."""

    def __init__(self, model: str) -> None:
        self.model, self.registry, self.process = model, CollectorRegistry(), CollectorRegistry()
        ProcessCollector(registry=self.process)
        self.first_token = self._histogram("time_to_first_token", "From a request's arrival to its first token", SLOW)
        self.between_tokens = self._histogram("inter_token", "Between two tokens of one answer", FAST)
        self.whole = self._histogram("request", "Completion requests from arrival to the end of the answer", SLOW)
        labels = ["route", "status", "model_name"]
        self.answered = Counter(
            "atma_http_requests", "Requests by route, status and model", labels, registry=self.registry
        )
        self.refused = Counter("atma_rejects", "Requests refused, by reason", ["reason"], registry=self.registry)
        self.gone = Counter("atma_disconnects", "Clients that left before their answer's end", registry=self.registry)
        self._engine = _Engine()
        self.registry.register(self._engine)  # pyright: ignore[reportArgumentType]

    def text(self, stats: dict[str, Any] | None) -> bytes:
        """All of it, with the engine's own counts if there is an engine."""
        self._engine.stats = stats
        told = CollectorRegistry(auto_describe=False)
        told.register(_Named(self.registry, self.model))  # pyright: ignore[reportArgumentType]
        return generate_latest(told) + generate_latest(self.process)

    def _histogram(self, name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"atma_{name}_seconds", told, buckets=buckets, registry=self.registry)


class _Named:
    """All of a registry, each sample with the model's name where it has none."""

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self.registry, self.model = registry, model

    def collect(self) -> Iterator[Metric]:
        for family in self.registry.collect():
            named = [sample._replace(labels={"model_name": self.model} | sample.labels) for sample in family.samples]
            family.samples = named
            yield family


class _Engine:
    """The engine's statistics as Prometheus collects them."""

    def __init__(self) -> None:
        self.stats: dict[str, Any] | None = None

    def collect(self) -> Iterator[Metric]:
        if self.stats is None:
            return
        stats = self.stats | {"queries": self.stats["cache_hits"] + self.stats["cache_misses"]}
        for key, (name, told) in GAUGES.items():
            yield GaugeMetricFamily(name, told, value=stats[key])
        for key, (name, told) in COUNTERS.items():
            yield CounterMetricFamily(name, told, value=stats[key])
