"""Prometheus' and Grafana's files name metrics that exist, with labels that they have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from deploy.settings import ROOT
from reward_server.metrics import METRICS

PROMETHEUS = ROOT / "deploy" / "prometheus.yml"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
OURS = {f"ray_{metric.name}{suffix}": metric for metric in METRICS for suffix in SUFFIXES[metric.kind]}
RAY_NAMES = re.compile(r"ray_(?:serve|node)_\w+")


def metrics_in(query: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", query))


def panels_of_ray() -> str:
    """The queries of the dashboards that Ray itself ships: what its exporter has, with the exporter's suffixes."""
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*_panels.py"))


def test_every_metric_of_the_dashboard_is_exported() -> None:
    named = {metric for query in QUERIES for metric in metrics_in(query)}
    known = set(OURS) | set(RAY_NAMES.findall(panels_of_ray()))
    assert named - known == set()


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = {OURS[metric].name for query in QUERIES for metric in metrics_in(query) if metric in OURS}
    assert shown == {metric.name for metric in METRICS}


def test_queries_group_by_labels_that_the_metric_has() -> None:
    for query in QUERIES:
        for metric in metrics_in(query) & OURS.keys():
            grouped = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(", ")}
            assert grouped - {"le"} <= set(OURS[metric].labels), query


def test_legends_show_labels_that_the_query_keeps() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert f"{label})" in target["expr"] or "by (" not in target["expr"], target


def test_panels_neither_overlap_nor_share_ids() -> None:
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24  # Grafana's columns
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_prometheus_finds_the_nodes_where_ray_lists_them() -> None:
    (job,) = yaml.safe_load(PROMETHEUS.read_text(encoding="utf-8"))["scrape_configs"]
    (discovery,) = job["http_sd_configs"]
    assert discovery["url"].endswith("/api/prometheus/sd")
    assert discovery["authorization"].keys() == {"credentials_file"}  # the token itself is in no file of ours


def promtool(*arguments: object) -> str:
    if (tool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed")
    command = [tool, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_prometheus_takes_its_configuration() -> None:
    promtool("check", "config", "--syntax-only", PROMETHEUS)


def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    queries = [query.replace("$__rate_interval", "1m") for query in QUERIES]
    rules = [{"record": f"query:{index}", "expr": query} for index, query in enumerate(queries)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)
