"""Pictures of what `star-sensitivity` found: statistics by denoising step, and a few cases to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from star_trainer.run.files import write_atomically
from star_trainer.studies.sensitivity.gradients import SUM, Signal
from star_trainer.studies.sensitivity.maps import Cases, Score

# Colours that people who confuse red and green can tell apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#000000", "#999999")
_FAINT = "#6b6b6b"


def panels_by_step(
    scores: Sequence[Score], signals: Sequence[Signal]
) -> dict[str, dict[str, list[tuple[int, float, float, float]]]]:
    """By statistic and kind of map or arm: denoising step, value and the bounds of its 95 % interval."""
    panels: dict[str, dict[str, list[tuple[int, float, float, float]]]] = {}
    for score in scores:
        line = panels.setdefault(score.what, {}).setdefault(score.map, [])
        line.append((score.step, score.value, score.low, score.high))
    for signal in signals:
        if not signal.step.startswith(SUM):
            for what, estimate in (("gradient signal / noise", signal.ratio), ("gradient cosine", signal.cosine)):
                line = panels.setdefault(what, {}).setdefault(signal.arm, [])
                line.append((int(signal.step), estimate.value, estimate.low, estimate.high))
    return panels


def plot_by_step(scores: Sequence[Score], signals: Sequence[Signal], path: Path) -> None:
    """A panel per statistic, a line with its 95 % band per kind of map or arm, over the denoising step, as PNG."""
    panels = panels_by_step(scores, signals)
    columns = min(3, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(4.8 * columns, 3.5 * rows), dpi=110, layout="constrained")
    for place, (title, lines) in enumerate(panels.items()):
        _panel(figure.add_subplot(rows, columns, place + 1), title, lines)
    _save(figure, path)


def _panel(axes: Axes, title: str, lines: dict[str, list[tuple[int, float, float, float]]]) -> None:
    for (name, points), colour in zip(lines.items(), (_COLOURS * (len(lines) // len(_COLOURS) + 1)), strict=False):
        step, value, low, high = np.array(points, dtype=float).T
        axes.plot(step + 1, value, color=colour, label=name, linewidth=1.4, marker="o", markersize=2.5)
        axes.fill_between(step + 1, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel("denoising step", fontsize=9, color=_FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7.5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.tick_params(labelsize=8, colors=_FAINT)


def plot_cases(
    cases: Cases, edited: dict[str, np.ndarray], rewards: dict[str, np.ndarray], steps: Sequence[int], path: Path
) -> None:
    """Some cases: the image, its map at some steps, and the image with regions painted over, each with its reward."""
    count = len(cases.prompts)
    figure = Figure(figsize=(1.7 * (1 + len(steps) + len(edited)), 2.15 * count), dpi=110, layout="constrained")
    axes = figure.subplots(count, 1 + len(steps) + len(edited), squeeze=False)
    largest = max(float(cases.maps["map"][list(steps)].max()), 1e-6)
    for case, row in enumerate(axes):
        row[0].imshow(cases.images[case])
        row[0].set_title(f"reward {rewards['before'][case]:.2f}", fontsize=8)
        row[0].set_ylabel("\n".join(_wrapped(cases.prompts[case].text)), fontsize=7.5)
        for panel, step in zip(row[1:], steps, strict=False):
            panel.imshow(cases.maps["map"][step, case], cmap="magma", vmin=0.0, vmax=largest)
            panel.set_title(f"map, step {step + 1}", fontsize=8)
        for panel, (name, images) in zip(row[1 + len(steps) :], edited.items(), strict=True):
            panel.imshow(images[case])
            panel.set_title(f"{name}: {rewards[name][case]:.2f}", fontsize=8)
        for panel in row:
            panel.set_xticks([])
            panel.set_yticks([])
    _save(figure, path)


def _wrapped(text: str, width: int = 22) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:4]


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
