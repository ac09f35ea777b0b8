"""Metrics of all replicas in one text: every sample with the label `replica`."""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


def merged(texts: Mapping[str, bytes]) -> bytes:
    """One text for Prometheus of each replica's."""
    families: dict[str, Metric] = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text.decode()):
            own = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                own.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))  # pyright: ignore[reportArgumentType]
    return generate_latest(registry)


class _Collected:
    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self.families)
