"""Charts as SVG: lines with bands, and differences with their intervals. Altair is imported when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Colours that people who confuse red and green can tell apart (Okabe and Ito); points differ in shape as well.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
_WIDTH, _HEIGHT = 290, 170
# Points of a chart, all its lines together: each is an element of the page.
_MOST_POINTS = 400


@dataclass(frozen=True)
class Line:
    """Values y at x, each [N], with the bounds of a band where there is one; NaN is a gap."""

    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    low: Sequence[float] | np.ndarray | None = None
    high: Sequence[float] | np.ndarray | None = None


def lines(series: Mapping[str, Line], x_title: str, *, whole: bool = True, from_zero: bool = False) -> str:
    """An SVG of lines by name, with their bands, over x; its points say their numbers (`aria-label`).

    Args:
        series: what is drawn. Of more points than can be told apart, means over equal parts are shown, and say so.
        x_title: of the horizontal axis.
        whole: x has whole numbers only.
        from_zero: the vertical axis begins at 0.
    """
    import altair as alt

    share = max(20, _MOST_POINTS // max(1, len(series)))
    rows = [row for name, line in series.items() for row in _rows(name, line, x_title, share)]
    data = alt.Chart(alt.Data(values=rows))
    places = [row["x"] for row in rows]
    ticks = min(6, round(max(places) - min(places))) if whole and places else 6
    shared: dict[str, Any] = {
        "x": alt.X("x:Q").title(x_title).axis(tickCount=max(1, ticks), grid=False).scale(zero=False, nice=False),
        "color": _colour(alt, series),
    }
    height = alt.Y("y:Q").title(None).scale(zero=from_zero)
    layers = [data.mark_line(strokeWidth=1.6, aria=False).encode(y=height, **shared)]
    if any(row["low"] is not None for row in rows):
        band = data.transform_filter("datum.low != null").mark_area(
            opacity=0.16 if len(series) < 4 else 0.08, aria=False
        )
        layers.insert(0, band.encode(y=alt.Y("low:Q").title(None).scale(zero=from_zero), y2="high:Q", **shared))
    points = data.transform_filter("datum.y != null").mark_point(filled=True, size=22, opacity=1.0)
    shape = alt.Shape("name:N").scale(domain=list(series), range=_cycled(_SHAPES, len(series))).legend(None)
    layers.append(points.encode(y=height, shape=shape, description="says:N", **shared))
    return _svg(alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT))


def intervals(values: Mapping[str, tuple[float, float, float]], x_title: str) -> str:
    """An SVG with a row for each name: a value, low and high as a point with its interval, and a line at 0."""
    import altair as alt

    rows = []
    for name, (value, low, high) in values.items():
        says = f"{name}: {_says(value, low, high)}"
        rows.append({"name": name, "value": _finite(value), "low": _finite(low), "high": _finite(high), "says": says})
    data = alt.Chart(alt.Data(values=rows))
    names = alt.Y("name:N").sort(list(values)).title(None)
    zero = alt.Chart(alt.Data(values=[{"at": 0}])).mark_rule(color="#6b6b6b", strokeDash=[3, 3], aria=False)
    bar = data.transform_filter("datum.low != null").mark_rule(color=COLOURS[0], strokeWidth=2, aria=False)
    point = data.mark_point(filled=True, size=60, opacity=1.0, color=COLOURS[0])
    chart = alt.layer(
        zero.encode(x="at:Q"),
        bar.encode(x="low:Q", x2="high:Q", y=names),
        point.encode(x=alt.X("value:Q").title(x_title), y=names, description="says:N"),
    )
    return _svg(chart.properties(width=_WIDTH, height=alt.Step(26)))


def _rows(name: str, line: Line, x_title: str, most: int) -> list[dict[str, Any]]:
    """What Vega-Lite gets: an entry per point, those of a long line averaged over equal parts of it."""
    gaps = np.full(len(line.x), math.nan)
    columns = (line.x, line.y, gaps if line.low is None else line.low, gaps if line.high is None else line.high)
    table = np.array(columns, dtype=np.float64).reshape(4, -1)
    table[~np.isfinite(table)] = math.nan
    parts = np.array_split(table, min(most, max(1, table.shape[1])), axis=1)
    rows = []
    for part in parts:
        if not part.shape[1]:
            continue
        x, y, low, high = (float(np.nanmean(row)) if np.isfinite(row).any() else math.nan for row in part)
        first, last = part[0, 0], part[0, -1]
        where = f"{x_title} {first:g}" if first == last else f"mean of {x_title} {first:g} to {last:g}"
        says = f"{name}, {where}: {_says(y, low, high)}"
        rows.append({"name": name, "x": x, "y": _finite(y), "low": _finite(low), "high": _finite(high), "says": says})
    return rows


def _says(value: float, low: float, high: float) -> str:
    interval = f" [{low:.4g}, {high:.4g}]" if math.isfinite(low) and math.isfinite(high) else ""
    return f"{value:.4g}{interval}"


def _finite(value: float) -> float | None:
    """JSON has null for what is not a number."""
    return float(value) if math.isfinite(value) else None


def _colour(alt: Any, series: Mapping[str, Line]) -> Any:
    scale = alt.Color("name:N").scale(domain=list(series), range=_cycled(COLOURS, len(series)))
    legend = alt.Legend(orient="top", title=None, columns=3, symbolOpacity=1, labelLimit=120)
    return scale.legend(legend if len(series) > 1 else None)


def _cycled(values: Sequence[str], count: int) -> list[str]:
    return [values[place % len(values)] for place in range(count)]


def _svg(chart: Any) -> str:
    text = {"labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"}
    chart = chart.configure_axis(domain=False, gridColor="#e4e4e4", **text)
    chart = chart.configure_view(stroke=None).configure_legend(labelFontSize=11)
    content = io.StringIO()
    chart.save(content, format="svg")
    return content.getvalue()
