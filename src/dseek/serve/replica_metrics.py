"""Metrics of several replicas as one text: every sample gets the label `replica`, and the router adds its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response

if TYPE_CHECKING:
    from dseek.serve.fleet import ReplicaFigures


class _Collected:
    """What `generate_latest` reads."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return the families."""
        return self._families


def merged_metrics(texts: Mapping[str, str], replicas: Sequence[ReplicaFigures]) -> Response:
    """Merge.

    Args:
        texts: what each replica's `/metrics` answered, by its name.
        replicas: all replicas, for the router's own gauges.

    Returns:
        A response in Prometheus' text format.
    """
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for found in text_string_to_metric_families(text):
            family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
            for sample in found.samples:
                labels = {**sample.labels, "replica": name}
                family.add_sample(sample.name, labels, sample.value)
    busy = GaugeMetricFamily("dseek_router_busy", "Requests that a replica has in work.", labels=("replica",))
    up = GaugeMetricFamily("dseek_router_replica_ready", "1 while a replica takes requests.", labels=("replica",))
    starts = CounterMetricFamily("dseek_router_replica_starts", "Starts of a replica.", labels=("replica",))
    for replica in replicas:
        label = (replica.name,)
        busy.add_metric(label, replica.busy)
        up.add_metric(label, int(replica.ready))
        starts.add_metric(label, replica.starts)
    written = generate_latest(_Collected([*families.values(), busy, up, starts]))
    return Response(written, media_type=CONTENT_TYPE_LATEST)
