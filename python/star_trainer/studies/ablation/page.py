"""The page of an ablation: differences to the baseline, curves by arm, and where each run's own page is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from star_trainer.report import Charts, Line, Link, Section, Table, intervals, lines, markdown_tables, page
from star_trainer.run.page import READING
from star_trainer.studies.ablation.plot import mean_curve
from star_trainer.studies.ablation.results import Curve, Row
from star_trainer.studies.ablation.runs import Run
from star_trainer.studies.ablation.training import Block, holm


def ablation_page(
    folder: Path,
    baseline: str,
    curves: Sequence[Curve],
    rows: Sequence[Row],
    blocks: Sequence[Block],
    tables: Mapping[str, str],
    runs: Sequence[Run],
) -> bytes:
    """HTML of what was compared.

    Args:
        folder: of the ablation; addresses of runs are relative to it.
        baseline: the arm that others are compared with.
        curves, rows, blocks: what was measured.
        tables: further tables in Markdown by their heading.
        runs: all of them, those that failed too.
    """
    differences = {
        f"Held-out {score}": {
            row.arm: (found.mean, found.low, found.high)
            for row in rows
            if row.score == score and (found := row.final_difference) is not None
        }
        for score in dict.fromkeys(row.score for row in rows)
    }
    shown = {title: intervals(values, f"less {baseline}") for title, values in differences.items() if values}
    sections = [
        Section(
            f"Differences to {baseline}",
            "Means over seeds; 95 % intervals of paired differences. Holm's p holds for all arms of a score together.",
            _differences(rows, baseline),
        ),
        *([Section("The same to look at", READING, Charts(shown))] if shown else []),
        *(Section(title, "", table) for title, text in tables.items() for table in markdown_tables(text)),
        Section(
            "Curves", f"Means over seeds with 95 % intervals. {READING}", Charts(_curves(curves, blocks, baseline))
        ),
    ]
    pages = {
        f"{run.arm}, seed {run.seed}": quote((run.folder / "report.html").relative_to(folder).as_posix())
        for run in runs
        if (run.folder / "report.html").is_file()
    }
    if pages:
        sections.append(Section("Runs", "The page of each run, with its images and maps.", Link(pages)))
    arms = dict.fromkeys(curve.arm for curve in curves)
    facts = {"arms": ", ".join(arms), "baseline": baseline, "runs that are done": f"{len(curves)} of {len(runs)}"}
    return page(f"Ablation {folder.resolve().name}", facts, sections)


def _differences(rows: Sequence[Row], baseline: str) -> Table:
    cells = []
    for score in dict.fromkeys(row.score for row in rows):
        own = [row for row in rows if row.score == score]
        p_values = [math.nan if row.final_difference is None else row.final_difference.p_value for row in own]
        for row, corrected in zip(own, holm(p_values), strict=True):
            low_high = "" if math.isnan(row.final.low) else f" [{row.final.low:.4f}, {row.final.high:.4f}]"
            line = [row.arm, score, str(row.final.n), f"{row.final.value:.4f}{low_high}"]
            if (found := row.final_difference) is None:
                line += ["baseline" if row.arm == baseline else "", "", ""]
            else:
                line.append(f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]")
                line += [f"{found.p_value:.2g}", f"{corrected:.2g}"]
            cells.append(line)
    return Table(["arm", "held-out score", "seeds", "mean", "difference", "p", "p, Holm"], cells)


def _curves(curves: Sequence[Curve], blocks: Sequence[Block], baseline: str) -> dict[str, str]:
    charts = {}
    arms = list(dict.fromkeys(curve.arm for curve in curves))
    if blocks:
        differences = {}
        for arm in dict.fromkeys(block.arm for block in blocks):
            own = [block for block in blocks if block.arm == arm]
            middles = [(block.first + block.last) / 2 for block in own]
            low, high = ([block.difference + sign * block.error for block in own] for sign in (-1, 1))
            differences[arm] = Line(middles, [block.difference for block in own], low, high)
        title = f"Training reward less {baseline}'s, ± standard error"
        charts[title] = lines(differences, "iteration", whole=False)
    for score in curves[0].scores:
        for kind, label in (("rollouts", "images drawn"), ("seconds", "seconds")):
            series = {}
            for arm in arms:
                x, means = mean_curve([curve for curve in curves if curve.arm == arm], score, kind)
                series[arm] = Line(x, *([getattr(m, part) for m in means] for part in ("value", "low", "high")))
            charts[f"Held-out {score} by {label}"] = lines(series, label, whole=False)
    return charts
