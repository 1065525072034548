"""The dashboard and the alert rules ask for metrics and labels that the server has, by the server's own collectors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rama_ebpf.control import exposition
from rama_ebpf.metrics import definitions

MONITORING = Path(__file__).parents[2] / "packaging/monitoring"
OF_PROMETHEUS = {"instance", "job", "le"}


def _families() -> Iterator[tuple[str, str, frozenset[str]]]:
    """Name, type and labels of each metric, out of what is registered and what the collectors make of one row each."""
    for attribute in definitions.__all__:
        metric = getattr(definitions, attribute)
        for family in metric.collect():
            yield family.name, family.type, frozenset(metric._labelnames)
    counts = SimpleNamespace(serving=1, expected=1)
    supervisor = SimpleNamespace(counts=counts, restarts=1, reloads=1, nursery=SimpleNamespace(failures={"work": 1}))
    collectors = [
        exposition.verdict_collector(lambda: {("rule", "office", "allow"): 1}),
        exposition.silent_rejects_collector(lambda: 1),
        exposition.feeds_collector(lambda: [{"rule": "office", "networks": 1, "age": 1.0, "trouble": None}]),
        exposition.disagreements_collector(lambda: 1),
        exposition.supervisor_collector(supervisor),  # type: ignore[arg-type]
        exposition.ways_collector(lambda: {"paris": True}),
        exposition.guard_collector({"xdp": 1}, dict),
        exposition.denials_collector(SimpleNamespace(counts=lambda: {("worker", "ptrace"): 1})),  # type: ignore[arg-type]
    ]
    for collector in collectors:
        for family in collector.collect():
            yield family.name, family.type, frozenset(name for row in family.samples for name in row.labels)


def _real() -> dict[str, frozenset[str]]:
    """What may be asked for, as Prometheus sees it, and its labels."""
    found = {}
    for name, kind, labels in _families():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(kind, [""])
        found.update({name + suffix: labels for suffix in suffixes})
    return found


def _queries() -> dict[str, str]:
    """All expressions, by who asks."""
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    alerts = (MONITORING / "alerts.yml").read_text()
    found |= {
        name: " ".join(expr.split())
        for name, expr in re.findall(r"- alert: (\w+)\n +expr: (?:>-\n)?(.*?)\n +(?:for|labels):", alerts, flags=re.S)
    }
    assert len(re.findall(r"^ *- alert: ", alerts, flags=re.M)) == sum(name.startswith("Rama") for name in found)
    return found


@pytest.mark.parametrize("query", _queries().items(), ids=lambda query: query[0])
def test_each_query_asks_for_metrics_and_labels_that_there_are(query: tuple[str, str]) -> None:
    _, expr = query
    real = _real()
    names = re.findall(r"\brama_\w+", expr)
    assert names
    assert [name for name in names if name not in real] == []
    labels = frozenset().union(*(real[name] for name in names)) | OF_PROMETHEUS
    asked = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expr)
    asked += [word.strip() for group in re.findall(r"\bby \(([^)]*)\)", expr) for word in group.split(",")]
    assert [label for label in asked if label not in labels] == []


def test_legends_and_summaries_show_labels_that_there_are() -> None:
    labels = frozenset().union(*_real().values()) | OF_PROMETHEUS
    text = "".join(path.read_text() for path in MONITORING.iterdir())
    shown = re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", text)
    assert len(shown) > 20
    assert [name for name in shown if name not in labels] == []
