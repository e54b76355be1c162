"""All metrics that services declare. `python -m tests.declared_metrics` writes their tables into docs/metrics.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from services.coordinator.metrics import CoordinatorMetrics
from services.environment.metrics import EnvironmentMetrics
from services.gpu_exporter.metrics import GpuMetrics
from services.reward.metrics import RewardMetrics
from services.sampler.metrics import SamplerMetrics
from services.trainer.metrics import TrainerMetrics
from shared.worker import WorkerMetrics

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"
BEGIN, END = "<!-- tables: python -m tests.declared_metrics -->", "<!-- end of tables -->"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}

AGREED: dict[str, dict[str, tuple[str, tuple[str, ...], str]]] = {
    "autoscaler": {
        "openrl_autoscaler_replicas": ("gauge", ("group",), "Replicas that start or are ready"),
        "openrl_autoscaler_replicas_wanted": ("gauge", ("group",), "Replicas that a group should have"),
        "openrl_autoscaler_replicas_unmet": ("gauge", ("group",), "Replicas that are wanted and cannot start"),
        "openrl_autoscaler_replica_milli": (
            "gauge", ("replica", "group", "node", "gpu"), "Placement: thousandths of a GPU's compute",
        ),
        "openrl_autoscaler_gpus": ("gauge", (), "GPUs in the inventory"),
        "openrl_autoscaler_gpus_used": ("gauge", (), "Of these, with a replica on them"),
        "openrl_autoscaler_decisions_total": (
            "counter", ("group", "decision", "cause"), "Decisions by kind and cause",
        ),
    },
    "gateway": {
        "openrl_gateway_requests_total": ("counter", ("endpoint", "status"), "Requests by endpoint and status"),
        "openrl_gateway_request_seconds": (
            "histogram", ("endpoint",), "From the head of a request to its answer; polls include their wait",
        ),
        "openrl_gateway_unanswered": ("gauge", (), "Operations and samples submitted here and not answered"),
        "openrl_gateway_refused_total": (
            "counter", ("tenant",), "Requests turned away because a tenant is at a limit",
        ),
    },
}  # fmt: skip
"""What dashboards and alerts read of services that declare it elsewhere, or do not declare it yet."""


class Engine:
    """As much of an engine as a sampler's metrics ask for at the start: nothing."""


@dataclass(frozen=True)
class Declared:
    """One metric."""

    service: str
    name: str
    kind: str
    labels: tuple[str, ...]
    what: str

    @property
    def series(self) -> set[str]:
        """Names under which Prometheus has it."""
        return {self.name, *(self.name + suffix for suffix in SUFFIXES.get(self.kind, ()) if suffix != "_total")}


SERVICES: dict[str, Callable[[CollectorRegistry], Any]] = {
    "every worker": WorkerMetrics,
    "coordinator": CoordinatorMetrics,
    "environment": EnvironmentMetrics,
    "reward": RewardMetrics,
    "sampler": lambda registry: SamplerMetrics(registry, Engine()),  # type: ignore[arg-type]
    "trainer": lambda registry: TrainerMetrics(registry, list),
    "gpu_exporter": lambda registry: GpuMetrics(registry, "host"),
}


def declared() -> list[Declared]:
    """Those of all services, and what is agreed of others."""
    found = [each for service, make in SERVICES.items() for each in _of(service, make)]
    for service, agreed in AGREED.items():
        found += (own := list(_there(service)))
        names = {each.name for each in own}
        found += [Declared(service, name, *rest) for name, rest in agreed.items() if name not in names]
    return found


def _there(service: str) -> Iterator[Declared]:
    """Of a service that may not be in this tree."""
    name = f"services.{service}"
    if find_spec(name) is not None and find_spec(f"{name}.metrics") is not None:
        yield from _of(service, getattr(import_module(f"{name}.metrics"), f"{service.capitalize()}Metrics"))


def _of(service: str, make: Callable[[CollectorRegistry], Any]) -> Iterator[Declared]:
    registry = CollectorRegistry()
    make(registry)
    for collector in list(registry._collector_to_names):
        for family in collector.describe():  # type: ignore[attr-defined]
            labels: Iterable[str] = getattr(collector, "_labelnames", ()) or getattr(family, "_labelnames", ())
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield Declared(service, name, family.type, tuple(labels), family.documentation)


def tables() -> str:
    """In Markdown."""
    parts = []
    for service in dict.fromkeys(each.service for each in declared()):
        rows = [each for each in declared() if each.service == service]
        lines = [f"### {service}", "", "| metric | type | labels | |", "|---|---|---|---|"]
        for each in rows:
            what = each.what.replace("|", "\\|")
            lines.append(f"| `{each.name}` | {each.kind} | {', '.join(each.labels)} | {what} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    """Replace the tables in the document."""
    text = DOCUMENT.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{after}")


if __name__ == "__main__":
    main()
