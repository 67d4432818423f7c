"""The picture of what allocation costs: ``python -m star_trainer.studies.cost.plot cost.json cost.png``."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from star_trainer.config import ConfigError
from star_trainer.run.files import write_atomically
from star_trainer.studies.cost.results import read_results

_SHOWN = ("rollout step", "update", "iteration")
# Colours that people who confuse red and green can tell apart (Okabe and Ito).
_COLOURS = {"fused": "#0072b2", "unfused": "#e69f00", "materialised": "#d55e00"}
_UNIFORM, _FAINT = "#8c8c8c", "#6b6b6b"


def plot_cost(content: dict[str, Any], path: Path) -> bool:
    """Draw STAR's time relative to uniform with 95 % intervals, and peak memory, as PNG; False if nothing is timed."""
    timed = [group for part in content["parts"].values() for group in part["groups"] if group["name"] in _SHOWN]
    groups = [group for group in timed if all("seconds" in member for member in group["members"])]
    if not groups:
        return False
    figure = Figure(figsize=(10.5, 1.0 + 1.15 * len(groups)), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, group in enumerate(groups):
        for offset, member in _placed(group["members"]):
            _draw_ratio(left, place + offset, member)
            _draw_memory(right, place + offset, member)
    left.axvline(1.0, color=_FAINT, linewidth=0.9, linestyle=":")
    left.set_xlabel("time of STAR / time of uniform, median and 95 % interval", fontsize=9, color=_FAINT)
    right.set_xlabel("peak memory, MB", fontsize=9, color=_FAINT)
    right.set_xlim(left=0)
    left.set_yticks(range(len(groups)), [f"{group['name']}\n{group['what']}" for group in groups], fontsize=8)
    left.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", labelsize=8.5, colors=_FAINT)
    handles: dict[str, Any] = {}
    for axes in (left, right):
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    figure_bytes = io.BytesIO()
    figure.savefig(figure_bytes, format="png")
    write_atomically(path, figure_bytes.getvalue())
    return True


def _placed(members: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """STAR's members and uniform's, and where each stands around its group's place."""
    shown = [member for member in members if member["method"] in ("star", "uniform")]
    shown.sort(key=lambda member: (list(_COLOURS).index(member["variant"]), member["method"] == "star"))
    return [((place - (len(shown) - 1) / 2) * 0.15, member) for place, member in enumerate(shown)]


def _draw_ratio(axes: Axes, y: float, member: dict[str, Any]) -> None:
    if member["method"] != "star":
        return
    ratio, colour = member["ratio"], _COLOURS[member["variant"]]
    axes.plot([ratio["low"], ratio["high"]], [y, y], color=colour, linewidth=1.6)
    axes.plot([ratio["median"]], [y], "o", color=colour, markersize=5, label=f"STAR, {member['variant']}")
    axes.annotate(
        f"{ratio['median']:.3f}",
        (ratio["high"], y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
        color=_FAINT,
    )


def _draw_memory(axes: Axes, y: float, member: dict[str, Any]) -> None:
    star = member["method"] == "star"
    colour = _COLOURS[member["variant"]] if star else _UNIFORM
    # Uniform on the kernels is filled, in plain PyTorch it is not.
    filled = star or member["variant"] == "fused"
    label = f"STAR, {member['variant']}" if star else f"uniform, {member['variant']}"
    axes.barh(y, member["peak_bytes"] / 1e6, 0.13, color=colour if filled else "white", edgecolor=colour, label=label)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw committed results again; 0, or 2 with one line of explanation."""
    parser = argparse.ArgumentParser(prog="python -m star_trainer.studies.cost.plot", description=__doc__)
    parser.add_argument("results", type=Path, help="cost.json of star-cost")
    parser.add_argument("picture", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)
    try:
        if not plot_cost(read_results(options.results), options.picture):
            raise ConfigError(f"{options.results}: expected times of a rollout step, an update or an iteration")
    except (ConfigError, OSError) as error:
        print(f"star-cost: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
