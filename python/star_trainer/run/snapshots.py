"""What every evaluation leaves: the weights that were evaluated and their scores, and which are the best so far."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from star_trainer.run.evaluation import HeldOut
from star_trainer.run.export import export_to
from star_trainer.run.files import write_atomically
from star_trainer.run.state import TrainingState

_SCORES, _BEST = "scores.json", "best.json"


def keep_snapshot(state: TrainingState, held_out: HeldOut) -> None:
    """Keep the latest evaluation's adapter and scores in ``snapshots/iteration_N``, and name the best in ``best.json``.

    The policy must still have the weights that were evaluated. A whole transformer is too large to be kept each time:
    of it only the scores are. Every process must call it; the main one writes.
    """
    root = folder_of(Path(state.config.run.folder))
    target = root / f"iteration_{state.iteration:06d}"
    partial = target.with_name(f"{target.name}.partial")
    if state.accelerator.is_main_process:
        for left in root.glob("*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
    if state.policy.config.lora is not None:
        export_to(state, partial)
    if not state.accelerator.is_main_process:
        return
    watched, evaluation = held_out.watched(), held_out.latest
    assert watched is not None and evaluation is not None, "both were evaluated"
    scores = {
        "iteration": state.iteration,
        "prompts": len(evaluation),
        "measured": evaluation.measured,
        "scores": evaluation.means(),
        "by_tag": held_out.by_tag(evaluation),
        "watched": {"base": watched[0], "now": watched[1]},
    }
    write_atomically(partial / _SCORES, json.dumps(scores, indent=2).encode())
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    # Later ones are of a run that has gone back since.
    comparable = [
        entry
        for entry in map(_scores, root.glob("iteration_*"))
        if entry.get("measured") == evaluation.measured and entry["iteration"] <= state.iteration
    ]
    # By how much better than the base on the same prompts: not all evaluations have as many.
    best = max(comparable, key=lambda entry: (entry["watched"]["now"] - entry["watched"]["base"], -entry["iteration"]))
    write_atomically(root / _BEST, json.dumps(best, indent=2).encode())


def _scores(snapshot: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((snapshot / _SCORES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def folder_of(run: Path) -> Path:
    """Where a run keeps its snapshots."""
    return run / "snapshots"


def best_iteration(run: Path) -> int | None:
    """The iteration of the best snapshot of a run, or None if nothing was evaluated."""
    try:
        return int(json.loads((folder_of(run) / _BEST).read_text(encoding="utf-8"))["iteration"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def iterations(run: Path) -> list[int]:
    """Those of which there is a snapshot, the newest first."""
    names = [path.name.removeprefix("iteration_") for path in folder_of(run).glob("iteration_*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)
