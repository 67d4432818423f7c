"""What came out of an ablation: means over seeds with intervals, and paired differences to the baseline."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import integrate

from star_trainer.run.statistics import Mean, PairedDifference, paired_difference, student_mean
from star_trainer.studies.ablation.runs import Run, read_metrics
from star_trainer.studies.ablation.training import Answer, Block


@dataclass(frozen=True)
class Curve:
    """One run: held-out scores by name at some iterations, and the seconds that training had taken by then."""

    arm: str
    seed: int
    iterations: list[int]
    rollouts: list[int]
    seconds: list[float]
    scores: dict[str, list[float]]
    final: dict[str, float]
    seconds_per_iteration: float

    def area(self, score: str) -> float:
        """The mean of the score over the run, by the trapezoidal rule over its evaluations."""
        if len(self.iterations) == 1:
            return self.scores[score][0]
        span = self.iterations[-1] - self.iterations[0]
        return float(integrate.trapezoid(self.scores[score], self.iterations)) / span


@dataclass(frozen=True)
class Row:
    """One arm and one score; differences are the arm's minus the baseline's over the seeds that both have."""

    arm: str
    score: str
    final: Mean
    area: Mean
    final_difference: PairedDifference | None
    area_difference: PairedDifference | None
    seconds_per_iteration: float
    seconds_ratio: float


def read_curve(run: Run) -> Curve:
    """The curve of a run that is done."""
    samples = run.config().rollout.prompts * run.config().rollout.samples
    records = read_metrics(run.folder)
    trained = [record for record in records if "reward/mean" in record]
    durations = [sum(r[f"seconds/{part}"] for part in ("rollout", "reward_wait", "update")) for r in trained]
    spent = dict(zip([0, *(int(r["iteration"]) for r in trained)], np.cumsum([0.0, *durations]).tolist(), strict=True))
    evaluated = [record for record in records if "eval/prompts" in record]
    names = [key.removeprefix("eval/") for key in evaluated[0] if key.startswith("eval/") and key != "eval/prompts"]
    iterations = [int(record["iteration"]) for record in evaluated]
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    return Curve(
        run.arm,
        run.seed,
        iterations,
        [iteration * samples for iteration in iterations],
        [spent[iteration] for iteration in iterations],
        {name: [record[f"eval/{name}"] for record in evaluated] for name in names},
        summary["final"],
        float(np.median(durations)),
    )


def compare(curves: Sequence[Curve], baseline: str) -> list[Row]:
    """A row per arm and score, in the order in which arms come.

    Raises:
        ValueError: the baseline has no run that is done.
    """
    by_arm: dict[str, dict[int, Curve]] = {}
    for curve in curves:
        by_arm.setdefault(curve.arm, {})[curve.seed] = curve
    if baseline not in by_arm:
        raise ValueError(f"baseline: expected one of {', '.join(by_arm) or 'no arm'}, got {baseline!r}")
    reference = by_arm[baseline]
    rows = []
    for score in next(iter(reference.values())).final:
        for arm, runs in by_arm.items():
            finals = {seed: curve.final[score] for seed, curve in runs.items()}
            areas = {seed: curve.area(score) for seed, curve in runs.items()}
            paces = {seed: curve.seconds_per_iteration for seed, curve in runs.items()}
            ratios = [paces[seed] / reference[seed].seconds_per_iteration for seed in paces.keys() & reference.keys()]
            other = arm != baseline
            rows.append(
                Row(
                    arm,
                    score,
                    student_mean(list(finals.values())),
                    student_mean(list(areas.values())),
                    _paired({seed: c.final[score] for seed, c in reference.items()}, finals) if other else None,
                    _paired({seed: c.area(score) for seed, c in reference.items()}, areas) if other else None,
                    float(np.median(list(paces.values()))),
                    float(np.median(ratios)) if ratios else math.nan,
                )
            )
    return rows


def _paired(before: Mapping[int, float], after: Mapping[int, float]) -> PairedDifference | None:
    """The difference over the seeds that both have; None for fewer than two."""
    seeds = sorted(before.keys() & after.keys())
    if len(seeds) < 2:
        return None
    return paired_difference(np.array([before[seed] for seed in seeds]), np.array([after[seed] for seed in seeds]))


def markdown(rows: Sequence[Row], baseline: str) -> str:
    """The rows as a table, one per score."""
    lines: list[str] = []
    for score in dict.fromkeys(row.score for row in rows):
        columns = [score, "seeds", "final", f"difference to {baseline}", "p", "mean over training", "difference", "p"]
        lines += [f"| {' | '.join([*columns, 's/iter', 'ratio'])} |", "|---" * (len(columns) + 2) + "|"]
        for row in rows:
            if row.score == score:
                cells = [row.arm, str(row.final.n), _mean(row.final), *_difference(row.final_difference)]
                cells += [_mean(row.area), *_difference(row.area_difference)]
                cells += [f"{row.seconds_per_iteration:.2f}", f"{row.seconds_ratio:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _mean(mean: Mean) -> str:
    return f"{mean.value:.4f}" + ("" if math.isnan(mean.low) else f" ± {mean.high - mean.value:.4f}")


def _difference(difference: PairedDifference | None) -> tuple[str, str]:
    if difference is None:
        return "", ""
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]", f"{difference.p_value:.2g}"


def training_markdown(blocks: Sequence[Block], reached: tuple[float, dict[str, int]] | None, baseline: str) -> str:
    """Training rewards less the baseline's by block of iterations, and when each arm has come to a common reward."""
    spans = sorted({(block.first, block.last) for block in blocks})
    level, iterations = reached if reached else (math.nan, {})
    columns = [f"training reward less {baseline}", "seeds", *(f"{first} to {last}" for first, last in spans)]
    columns += [f"iterations to {level:.3f}"] if reached else []
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm in dict.fromkeys([baseline, *(block.arm for block in blocks)]):
        own = {(block.first, block.last): block for block in blocks if block.arm == arm}
        counts = sorted({block.n for block in own.values()})
        cells = [_block(own[span]) if span in own else "" for span in spans]
        cells += [str(iterations.get(arm, ""))] if reached else []
        lines.append(f"| {' | '.join([arm, ' to '.join(map(str, counts)), *cells])} |")
    return "\n".join([*lines, ""])


def _block(block: Block) -> str:
    return f"{block.difference:+.4f}" + ("" if math.isnan(block.error) else f" ± {block.error:.4f}")


def answers_markdown(answers: Sequence[Answer]) -> str:
    """The planned comparisons, with Holm's correction for the number of questions by each measure."""
    columns = ["question", "arms", "measure", "seeds", "difference", "p", "p, Holm"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for answer in answers:
        corrected = "" if math.isnan(answer.corrected) else f"{answer.corrected:.2g}"
        cells = [answer.question, f"{answer.arm} less {answer.against}", answer.measure, str(answer.n)]
        lines.append(f"| {' | '.join([*cells, *_difference(answer.difference), corrected])} |")
    return "\n".join([*lines, ""])


def as_json(curves: Sequence[Curve], rows: Sequence[Row], settings: Mapping[str, Any]) -> str:
    """Everything, raw numbers included; what is not a number is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    content = {**settings, "rows": [asdict(row) for row in rows], "runs": [asdict(curve) for curve in curves]}
    return json.dumps(plain(content), indent=1)
