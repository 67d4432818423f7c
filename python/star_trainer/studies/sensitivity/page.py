"""The page of `star-sensitivity`: statistics by denoising step, and cases with their maps and edits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from star_trainer.config import Config
from star_trainer.report import Charts, Denoising, Line, Pairs, Section, lines, markdown_tables, page
from star_trainer.run.page import READING
from star_trainer.studies.sensitivity.gradients import Signal
from star_trainer.studies.sensitivity.maps import Score
from star_trainer.studies.sensitivity.plots import panels_by_step


def sensitivity_page(
    config: Config,
    iteration: int,
    scores: Sequence[Score],
    signals: Sequence[Signal],
    table: str,
    denoising: Denoising,
    edits: Pairs | None,
) -> bytes:
    """HTML of what was measured after so many iterations; `table` has all of it in Markdown."""
    charts = {}
    for title, series in panels_by_step(scores, signals).items():
        found = {}
        for name, points in series.items():
            step, value, low, high = np.array(points, dtype=float).T
            found[name] = Line(step + 1, value, low, high)
        charts[title] = lines(found, "denoising step")
    sections = [
        Section("By denoising step", f"Means with 95 % intervals. {READING}", Charts(charts)),
        Section(
            "Cases",
            "The image that each denoising step predicts; over it the map that training would use, or that of one "
            "text unit alone.",
            denoising,
        ),
    ]
    if edits is not None:
        text = "Painted over: where the map is largest (inside), and as much elsewhere (outside). With the reward."
        sections.append(Section("Edits", text, edits))
    tables = markdown_tables(table)
    sections += [Section(part.header[0], "", part) for part in tables]
    facts = {"model": config.model.pipeline, "iterations trained": str(iteration), "seed": str(config.run.seed)}
    return page(f"What the map of {config.model.pipeline} points at", facts, sections)
