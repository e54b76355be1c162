"""From pages to the JSON that Grafana loads, through Grafana's own library of types."""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    FieldColorModeId,
    GridPos,
    VariableOption,
    VariableRefresh,
)

from dashboards.model import Choice, Mark, Page, Panel, Query, Row

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24
TAG = "openrl"
LETTERS = "ABCDEFGHIJ"


def rendered(page: Page) -> str:
    """A page as JSON, the same each time."""
    builder = (
        dashboard.Dashboard(page.title)
        .uid(page.uid)
        .description(page.description)
        .tags([TAG])
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time("now-30m", "now")
        .refresh("10s")
        .variables([_source_variable(), *(_choice(choice) for choice in page.choices)])
        .annotations([_mark(mark) for mark in page.marks])
        .link(dashboard.DashboardLink("OpenRL").tags([TAG]).as_dropdown(True).include_vars(False).keep_time(True))
    )
    top, number = 0, 1
    for row in page.rows:
        builder = builder.with_row(_row(row, number, top))
        top, number = top + 1, number + 1
        left, tallest = 0, 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                top, left, tallest = top + tallest, 0, 0
            builder = builder.with_panel(_panel(panel, number, GridPos(panel.height, panel.width, left, top)))
            left, tallest, number = left + panel.width, max(tallest, panel.height), number + 1
        top += tallest
    raw = json.loads(JSONEncoder(sort_keys=True).encode(builder.build()))
    for mark, annotation in zip(page.marks, raw["annotations"]["list"], strict=True):
        # Settings of Prometheus's annotations, which the library's type lacks.
        annotation |= {"titleFormat": mark.name, "textFormat": mark.text, "step": "30s", "tagKeys": ""}
    return json.dumps(raw, sort_keys=True, indent=2) + "\n"


def _row(row: Row, number: int, top: int) -> dashboard.Row:
    return dashboard.Row(row.title).id(number).grid_pos(GridPos(1, WIDTH, 0, top))


def _panel(panel: Panel, number: int, place: GridPos) -> Any:
    builder: Any = _KINDS[panel.kind]()
    builder = (
        builder.id(number)
        .title(panel.title)
        .description(panel.description)
        .datasource(SOURCE)
        .grid_pos(place)
        .unit(panel.unit)
        .targets([_target(query, letter) for query, letter in zip(panel.queries, LETTERS, strict=False)])
        .no_value("no data")
    )
    if panel.top is not None:
        builder = builder.max(panel.top)
    if panel.bottom is not None:
        builder = builder.min(panel.bottom)
    return builder


def _lines() -> Any:
    return (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(8)
        .show_points(shapes.VisibilityMode.AUTO)
        .legend(_legend())
        .tooltip(_tooltip())
    )


def _stacked() -> Any:
    stacking = common.StackingConfig().mode(shapes.StackingMode.NORMAL)
    return _lines().fill_opacity(40).stacking(stacking)


def _number() -> Any:
    last = common.ReduceDataOptions().calcs(["lastNotNull"])
    return (
        stat.Panel()
        .reduce_options(last)
        .graph_mode(shapes.BigValueGraphMode.AREA)
        .color_mode(shapes.BigValueColorMode.VALUE)
        .text_mode(shapes.BigValueTextMode.VALUE_AND_NAME)
    )


def _timeline() -> Any:
    # One line for each pair of GPU and replica, drawn while there is a value; its colour says how large it is.
    return (
        statetimeline.Panel()
        .merge_values(False)
        .show_value(shapes.VisibilityMode.AUTO)
        .row_height(0.9)
        .fill_opacity(80)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.CONTINUOUS_GR_YL_RD))
        .legend(_legend())
        .tooltip(_tooltip())
    )


_KINDS = {"lines": _lines, "stacked": _stacked, "number": _number, "timeline": _timeline}


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(shapes.LegendDisplayMode.LIST)
        .placement(shapes.LegendPlacement.BOTTOM)
        .calcs([])
    )


def _tooltip() -> common.VizTooltipOptions:
    return common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING)


def _target(query: Query, letter: str) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .ref_id(letter)
        .datasource(SOURCE)
        .expr(query.expr)
        .legend_format(query.legend)
        .range()
        .interval("")
    )


def _source_variable() -> dashboard.DatasourceVariable:
    return (
        dashboard.DatasourceVariable("datasource")
        .label("Prometheus")
        .type("prometheus")
        .current(VariableOption(text="OpenRL", value="openrl"))
    )


def _choice(choice: Choice) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(choice.name)
        .label(choice.label)
        .datasource(SOURCE)
        .query(f"label_values({choice.of}, {choice.values})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(text="All", value="$__all", selected=True))
    )


def _mark(mark: Mark) -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name(mark.name)
        .datasource(SOURCE)
        .enable(True)
        .hide(False)
        .icon_color("purple")
        .expr(mark.query.expr)
    )
