"""The page of `star-eval`: scores with intervals, and images of both models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from star_trainer.report import Charts, Denoising, Pairs, Section, intervals, markdown_tables, page
from star_trainer.run.page import READING
from star_trainer.studies.evaluate.tables import DIFFERENCE, Row


def evaluation_page(
    settings: Mapping[str, object], rows: Sequence[Row], table: str, pairs: Pairs, denoising: Denoising
) -> bytes:
    """HTML of what was measured with `settings`; `table` has all of it in Markdown.

    `denoising` shows how the model with what was trained, if anything, makes its first images.
    """
    sections = [
        Section("Scores", "Means with 95 % bootstrap intervals over prompts.", part) for part in markdown_tables(table)
    ]
    charts = {}
    for reward in dict.fromkeys(row.reward for row in rows):
        own = [row for row in rows if row.reward == reward]
        if found := {row.tag: row.estimates[DIFFERENCE] for row in own if DIFFERENCE in row.estimates}:
            charts[reward] = intervals({tag: (m.value, m.low, m.high) for tag, m in found.items()}, "adapter less base")
    if charts:
        sections.append(Section("What the adapter changes", READING, Charts(charts)))
    score = rows[0].reward
    sections.append(Section("Images", f"The first of each of the first prompts, with its score, {score}.", pairs))
    forming = "The image that each denoising step predicts; over it the map of all text units or of one alone."
    if not denoising.has_maps:
        forming = "The image that each denoising step predicts. The prompts have no text units: there are no maps."
    sections.append(Section("How images form", forming, denoising))
    facts = {name: str(value) for name, value in settings.items() if value is not None}
    return page(f"Evaluation of {settings['model.pipeline']}", facts, sections)
