"""Mean scores with bootstrap intervals, by GenEval's tags and over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from star_trainer.run.statistics import Mean, bootstrap_mean
from star_trainer.studies.evaluate.sets import Distance

OVERALL, DIFFERENCE = "overall", "difference"


@dataclass(frozen=True)
class Row:
    """The scores of one reward on the prompts of one tag, by model, and their difference where there are two."""

    reward: str
    tag: str
    prompts: int
    estimates: dict[str, Mean]


def tabulate(scores: Mapping[str, Mapping[str, np.ndarray]], tags: Sequence[str | None]) -> list[Row]:
    """Rows for each reward: one per tag, in the order in which tags come, then one over all.

    Args:
        scores: by model and reward [P, S]: S samples of P prompts. With two models their difference, second minus
            first, is taken prompt by prompt.
        tags: P tags, or None where a prompt has none. The row over all is the mean over tags, as in GenEval.
    """
    by_tag: dict[str, list[int]] = {}
    for place, tag in enumerate(tags):
        by_tag.setdefault(str(tag or ""), []).append(place)
    rows = []
    models = list(scores)
    for reward in scores[models[0]]:
        # Samples of a prompt are not independent of each other: a prompt counts with their mean.
        values = {model: scores[model][reward].mean(axis=1) for model in models}
        if len(models) == 2:
            values[DIFFERENCE] = values[models[1]] - values[models[0]]
        if len(by_tag) > 1:
            for tag, places in by_tag.items():
                estimates = {column: bootstrap_mean([v[places]]) for column, v in values.items()}
                rows.append(Row(reward, tag or "without tag", len(places), estimates))
        estimates = {column: bootstrap_mean([v[places] for places in by_tag.values()]) for column, v in values.items()}
        rows.append(Row(reward, OVERALL, len(tags), estimates))
    return rows


def r0_table(steps: int, scores: Mapping[str, Mapping[str, np.ndarray]], fids: Mapping[str, float]) -> str:
    """R0's table (arXiv 2503.13070), a line per model: what it is measured by, HPS times 100 as there.

    Args:
        steps: of the sampler.
        scores: by model and reward [P, S]; what is not among them is left blank.
        fids: by model, where FID was measured.
    """
    lines = [["model", "steps", "HPS", "aesthetic", "CLIP score", "FID", "ImageReward"]]
    for model, found in scores.items():
        cells = [
            f"{scale * found[name].mean():.2f}" if name in found else ""
            for name, scale in (("hps", 100.0), ("aesthetic", 1.0), ("clip_score", 1.0), ("image_reward", 1.0))
        ]
        fid = f"{fids[model]:.2f}" if model in fids else ""
        lines.append([model, str(steps), *cells[:3], fid, cells[3]])
    return _aligned(lines)


def sets_table(distances: Mapping[str, Distance]) -> str:
    """FID and KID of each model's pictures."""
    lines = [["model", "pictures", "reference", "FID", "KID"]]
    for model, found in distances.items():
        kid = f"{found.kid:.5f} ± {found.kid_std:.5f}"
        lines.append([model, str(found.pictures), str(found.reference), f"{found.fid:.3f}", kid])
    return _aligned(lines)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table for people and for Markdown."""
    columns = list(rows[0].estimates)
    header = ["reward", "tag", "prompts", *columns]
    lines = [header]
    for row in rows:
        cells = [_cell(row.estimates[column], signed=column == DIFFERENCE) for column in columns]
        lines.append([row.reward, row.tag, str(row.prompts), *cells])
    return _aligned(lines)


def _aligned(lines: list[list[str]]) -> str:
    """Cells as a table for people and for Markdown; the first line is its header."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    shown = ("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(f"{line} |" for line in shown) + "\n"


def _cell(value: Mean, *, signed: bool) -> str:
    form = "+.4f" if signed else ".4f"
    if math.isnan(value.low):
        return f"{value.value:{form}}"
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
