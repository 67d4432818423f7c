"""Held-out scores of the first model, of STAR and of R0 at few steps, over seeds: `python -m bench.few_steps --help`.

docs/r0.md has its table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from star_trainer.config import load_config
from star_trainer.config.command_line import quieten
from star_trainer.prompts import Prompt
from star_trainer.rewards import load_reward
from star_trainer.rewards.scenes import scene_graded, scene_strict
from star_trainer.run.evaluation import evaluate
from star_trainer.run.inputs import load_prompts
from star_trainer.run.randomness import numpy_stream
from star_trainer.run.state import build_state
from star_trainer.run.statistics import student_mean
from tqdm import tqdm

from bench.harness import read_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--r0", help="runs of R0, with {seed} in their folder's name; without it they are left out")
    parser.add_argument("--star", help="runs of STAR, likewise")
    parser.add_argument("--levels", choices=["pipeline", "even"], default="even", help="of the four steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/few_steps.json"))
    options = parser.parse_args()
    quieten()
    # Seeds that are measured already are not measured again.
    rows = read_json(options.out)["rows"] if options.out.is_file() else []
    models = [("first model", None, 4, options.levels), ("first model", None, 28, "pipeline")]
    trained = [("STAR", options.star), ("R0", options.r0)]
    models += [(name, runs, 4, options.levels) for name, runs in trained if runs is not None]
    with tqdm(total=len(options.seeds) * len(models), unit="evaluation") as bar:
        for seed in options.seeds:
            for name, runs, steps, levels in models:
                place = {"seed": seed, "model": name, "steps": steps, "levels": levels}
                if not any(place.items() <= row.items() for row in rows):
                    rows.append(place | measure(runs, seed, steps, levels))
                    write_json(options.out, {"rows": rows})
                bar.update()
    print(table(rows))


def measure(runs: str | None, seed: int, steps: int, levels: str) -> dict[str, float]:
    """Mean scores of 512 held-out images of a model, and the seconds per image, decoding and scoring included."""
    config = load_config("tiny_r0", [f"run.seed={seed}", f"evaluation.steps={steps}", f"model.levels={levels}"])
    state = build_state(config)
    if runs is not None and not state.take_average(Path(runs.format(seed=seed)) / "checkpoints"):
        raise SystemExit(f"{runs.format(seed=seed)}: expected a run with a checkpoint")
    _, draw_held_out = load_prompts(config.prompts)
    prompts = draw_held_out(numpy_stream(seed, "held-out"), config.evaluation.prompts)
    clip_score = load_reward(config.reward)

    def score(images: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        scorers = {"strict": scene_strict, "graded": scene_graded, "clip_score": clip_score}
        return {name: scorer(images, prompts) for name, scorer in scorers.items()}

    with state.policy.base_weights() if runs is None else nullcontext():
        start = time.perf_counter()
        found = evaluate(state.policy, config, prompts, score, state.accelerator)
    return {**found.means(), "seconds_per_image": (time.perf_counter() - start) / len(prompts)}


def table(rows: list[dict[str, float]]) -> str:
    """Means over seeds with 95 % intervals (t)."""
    scores = ("clip_score", "graded", "strict", "seconds_per_image")
    lines = ["| model | steps | levels | seeds | " + " | ".join(scores) + " |", "|---" * (len(scores) + 4) + "|"]
    for place in dict.fromkeys((row["model"], row["steps"], row["levels"]) for row in rows):
        of = [row for row in rows if (row["model"], row["steps"], row["levels"]) == place]
        means = [student_mean([row[score] for row in of]) for score in scores[:-1]]
        cells = [f"{mean.value:.3f} ± {mean.high - mean.value:.3f}" for mean in means]
        cells.append(f"{np.median([row['seconds_per_image'] for row in of]):.3f}")
        lines.append(f"| {' | '.join(map(str, place))} | {len(of)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
