"""The picture of an ablation: held-out reward against rollouts and against seconds, with bands over seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from star_trainer.run.files import write_atomically
from star_trainer.run.statistics import student_mean
from star_trainer.studies.ablation.results import Curve

# Colours that people who confuse red and green can tell apart (Okabe and Ito), and a line style for each of two rounds.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
_STYLES = ("-", "--", ":")
_FAINT = "#6b6b6b"


def plot_ablation(curves: Sequence[Curve], path: Path) -> None:
    """Draw mean curves with 95 % bands over seeds into a PNG: a row per score, by rollouts and by seconds."""
    scores = list(curves[0].scores)
    figure = Figure(figsize=(10.5, 3.6 * len(scores)), dpi=120, layout="constrained")
    axes = figure.subplots(len(scores), 2, squeeze=False)
    for row, score in enumerate(scores):
        for column, (kind, label) in enumerate((("rollouts", "images drawn for training"), ("seconds", "seconds"))):
            _panel(axes[row][column], curves, score, kind)
            axes[row][column].set_xlabel(label, fontsize=9, color=_FAINT)
        axes[row][0].set_ylabel(f"held-out {score}", fontsize=9.5)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), frameon=False, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def _panel(axes: Axes, curves: Sequence[Curve], score: str, kind: str) -> None:
    for place, arm in enumerate(dict.fromkeys(curve.arm for curve in curves)):
        own = [curve for curve in curves if curve.arm == arm]
        points = min(len(curve.iterations) for curve in own)
        x = np.mean([getattr(curve, kind)[:points] for curve in own], axis=0)
        means = [student_mean([curve.scores[score][point] for curve in own]) for point in range(points)]
        colour, style = _COLOURS[place % len(_COLOURS)], _STYLES[place // len(_COLOURS) % len(_STYLES)]
        axes.plot(x, [m.value for m in means], style, color=colour, label=arm, linewidth=1.6, marker="o", markersize=3)
        axes.fill_between(x, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.12, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, colors=_FAINT)
