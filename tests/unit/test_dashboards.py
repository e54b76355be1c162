"""Dashboards are what the code says, whole, and ask only for metrics that somebody exports."""

from __future__ import annotations

import json
import re
from itertools import combinations
from typing import Any

import pytest
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.build import JSON, PAGES, files
from dashboards.model import Page, Query
from services.local.prometheus import rule_files
from tests.declared_metrics import BEGIN, DOCUMENT, END, declared, tables

ELSEWHERE = {"up", "process_cpu_seconds_total", "process_resident_memory_bytes"}
"""Prometheus's own, and those that its client library gives every process."""


def recorded() -> set[str]:
    return set(re.findall(r"- record: (\S+)", rule_files()[0].read_text()))


def known() -> set[str]:
    return ELSEWHERE | recorded() | {name for each in declared() for name in each.series}


def panels(page: Page) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((JSON / f"{page.uid}.json").read_text())["panels"]
    return found


def test_committed_files_are_those_that_the_code_writes() -> None:
    wanted = files()
    assert {path.name for path in JSON.iterdir()} == {path.name for path in wanted}
    different = [path.name for path, text in wanted.items() if path.read_text() != text]
    assert not different, "run `python -m dashboards.build`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.uid)
def test_every_metric_that_is_asked_for_exists(page: Page) -> None:
    missing = {(title, name) for title, query in page.queries() for name in query.metrics - known()}
    assert missing == set()
    assert all(query.metrics for _, query in page.queries())
    assert {choice.of for choice in page.choices} <= known()


def test_every_metric_that_a_rule_asks_for_exists() -> None:
    for path in rule_files():
        expressions = re.sub(r"#.*|(summary|description): .*", "", path.read_text())
        names = Query(expressions, "").metrics - recorded()
        names = {name for name in names if not name.endswith(("_", ":"))}  # the beginning of a regular expression
        assert names <= known(), names - known()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.uid)
def test_every_panel_says_what_it_shows(page: Page) -> None:
    shown = [panel for panel in panels(page) if panel["type"] != "row"]
    numbers = [panel["id"] for panel in panels(page)]
    assert len(set(numbers)) == len(numbers)
    for panel in shown:
        assert panel["title"], panel
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["targets"], panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters), panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    assert len({panel["title"] for panel in shown}) >= len(shown) - 1, "titles tell panels apart"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.uid)
def test_panels_do_not_overlap(page: Page) -> None:
    places = [panel["gridPos"] for panel in panels(page)]
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    assert all(place["x"] + place["w"] <= 24 for place in places)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.uid)
def test_grafanas_own_types_read_the_files_back(page: Page) -> None:
    raw = json.loads((JSON / f"{page.uid}.json").read_text())
    read = Dashboard.from_json(raw)
    assert read.uid == page.uid
    assert len(read.panels or []) == len(raw["panels"])


def test_pages_are_told_apart() -> None:
    assert len({page.uid for page in PAGES}) == len(PAGES)


def test_the_document_lists_every_metric() -> None:
    text = DOCUMENT.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == tables(), "run `python -m tests.declared_metrics`"
    assert [name for name in recorded() if f"`{name}`" not in text] == []


def test_names_follow_prometheus_conventions() -> None:
    ours = [each for each in declared() if each.name.startswith("openrl_")]
    assert [each.name for each in ours if each.kind == "counter" and not each.name.endswith("_total")] == []
    assert [each.name for each in ours if each.kind != "counter" and each.name.endswith("_total")] == []
    assert [each.name for each in ours if not re.fullmatch(r"[a-z_]+", each.name)] == []
    assert [each.name for each in ours if {"job", "instance"} & set(each.labels)] == []
