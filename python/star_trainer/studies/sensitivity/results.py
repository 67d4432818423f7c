"""What `star-sensitivity` has written, to go on with: parts that are measured later join those that are there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from star_trainer.config import ConfigError
from star_trainer.studies.sensitivity.gradients import Estimate, Signal, Steps
from star_trainer.studies.sensitivity.maps import Score
from star_trainer.studies.sensitivity.progress import Progress

# What the parts' scores are called.
_OBJECTS = ("object AUROC", "weight on objects")


def part_of(score: Score) -> str:
    """The part that a score belongs to: objects or edits."""
    return "objects" if score.what in _OBJECTS else "edits"


def kept_results(
    folder: Path, parts: list[str], settings: Mapping[str, Any]
) -> tuple[list[Score], list[Signal], list[Steps], list[Progress], dict[str, Any]]:
    """Scores, signals, how steps go together and what they gain that are in the folder and belong to none of `parts`,
    and the allocations of the arms among them.

    Raises:
        ConfigError: there are some, and they were measured with other `settings`.
    """
    path = folder / "sensitivity.json"
    if not path.is_file():
        return [], [], [], [], {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        scores = [Score(**{**row, **_numbers(row, "value", "low", "high")}) for row in content["scores"]]
        signals = [_signal(row) for row in content["gradients"]]
        steps = [_steps(row) for row in content.get("steps", [])]
        progress = [Progress(**{**row, **_numbers(row, "low", "high")}) for row in content.get("progress", [])]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--folder: {path} cannot be read ({error}); choose another folder") from error
    scores = [score for score in scores if part_of(score) not in parts]
    if "gradients" in parts:
        signals, steps, progress = [], [], []
    if (scores or signals) and any(content.get(key) != value for key, value in settings.items()):
        raise ConfigError(
            f"--folder: {folder} holds other parts measured with other settings; choose another folder, or the same "
            "settings"
        )
    return scores, signals, steps, progress, content.get("arms", {}) if signals else {}


def _numbers(row: Mapping[str, Any], *names: str) -> dict[str, float]:
    """JSON has null for what is not a number."""
    return {name: math.nan if row[name] is None else row[name] for name in names}


def _estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    return None if value is None else Estimate(**_numbers(value, "value", "low", "high"))


def _steps(row: Mapping[str, Any]) -> Steps:
    cosines = [[_estimate(value) for value in line] for line in row["cosines"]]
    return Steps(row["arm"], row["steps"], row["weights"], cosines)


def _signal(row: Mapping[str, Any]) -> Signal:
    values: dict[str, Any] = {
        name: _estimate(value) if isinstance(value, dict) else value for name, value in row.items()
    }
    return Signal(**values | _numbers(row, "squared_mean", "covariance_trace"))
