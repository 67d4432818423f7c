"""The picture of an ablation: training rewards less the baseline's, and held-out rewards with bands over seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from star_trainer.run.files import write_atomically
from star_trainer.run.statistics import Mean, student_mean
from star_trainer.studies.ablation.results import Curve
from star_trainer.studies.ablation.training import Block

# Colours that people who confuse red and green can tell apart (Okabe and Ito), and a line style for each of two rounds.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
_STYLES = ("-", "--", ":")
_FAINT = "#6b6b6b"


def plot_ablation(curves: Sequence[Curve], blocks: Sequence[Block], path: Path) -> None:
    """Draw into a PNG: training rewards less the baseline's with standard errors, where there are `blocks`; and a row
    per held-out score, by rollouts and by seconds, of mean curves with 95 % bands over seeds.
    """
    scores = list(curves[0].scores)
    height = 3.6 * (len(scores) + bool(blocks))
    figure = Figure(figsize=(10.5, height), dpi=120, layout="constrained")
    grid = figure.add_gridspec(len(scores) + bool(blocks), 2)
    arms = list(dict.fromkeys([curve.arm for curve in curves] + [block.arm for block in blocks]))
    if blocks:
        _differences(figure.add_subplot(grid[0, :]), blocks, arms)
    axes = [[figure.add_subplot(grid[row + bool(blocks), column]) for column in (0, 1)] for row in range(len(scores))]
    for row, score in enumerate(scores):
        for column, (kind, label) in enumerate((("rollouts", "images drawn for training"), ("seconds", "seconds"))):
            _panel(axes[row][column], curves, score, kind, arms)
            axes[row][column].set_xlabel(label, fontsize=9, color=_FAINT)
        axes[row][0].set_ylabel(f"held-out {score}", fontsize=9.5)
    shown: dict[str, Any] = {}
    for panel in figure.axes:
        shown |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    names = [arm for arm in arms if arm in shown]
    handles = [shown[name] for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=min(6, len(names)), frameon=False, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def _look(arms: Sequence[str], arm: str) -> tuple[str, str]:
    """An arm's colour and line style."""
    rounds, place = divmod(arms.index(arm), len(_COLOURS))
    return _COLOURS[place], _STYLES[rounds % len(_STYLES)]


def _differences(axes: Axes, blocks: Sequence[Block], arms: Sequence[str]) -> None:
    """Each arm's training reward less the baseline's in the middle of each block, with its standard error."""
    compared = list(dict.fromkeys(block.arm for block in blocks))
    axes.axhline(0.0, color=_FAINT, linewidth=0.8)
    for place, arm in enumerate(compared):
        own = [block for block in blocks if block.arm == arm]
        colour, style = _look(arms, arm)
        # Side by side, so that error bars do not cover each other.
        x = [(block.first + block.last) / 2 + 0.25 * (place - (len(compared) - 1) / 2) for block in own]
        errors = np.nan_to_num([block.error for block in own])
        axes.errorbar(
            x, [block.difference for block in own], errors, color=colour, linestyle=style, label=arm, linewidth=1.4,
            marker="o", markersize=3,
        )  # fmt: skip
    axes.set_xlabel("iteration", fontsize=9, color=_FAINT)
    axes.set_ylabel("training reward less the baseline's", fontsize=9.5)
    _tidy(axes)


def _panel(axes: Axes, curves: Sequence[Curve], score: str, kind: str, arms: Sequence[str]) -> None:
    for arm in dict.fromkeys(curve.arm for curve in curves):
        x, means = mean_curve([curve for curve in curves if curve.arm == arm], score, kind)
        colour, style = _look(arms, arm)
        axes.plot(x, [m.value for m in means], style, color=colour, label=arm, linewidth=1.6, marker="o", markersize=3)
        axes.fill_between(x, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.12, linewidth=0)
    _tidy(axes)


def mean_curve(curves: Sequence[Curve], score: str, kind: str) -> tuple[np.ndarray, list[Mean]]:
    """The mean over the seeds of an arm, as far as all have come: x by `kind`, ``rollouts`` or ``seconds``, and y."""
    points = min(len(curve.iterations) for curve in curves)
    x = np.mean([getattr(curve, kind)[:points] for curve in curves], axis=0)
    return x, [student_mean([curve.scores[score][point] for curve in curves]) for point in range(points)]


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=_FAINT)
