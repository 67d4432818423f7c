"""``star-ablate``: the same training with several allocations and seeds, and what the differences amount to."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from star_trainer.config import REWARD_GRADIENT_METHODS, ConfigError, Method, has_keys, load_config
from star_trainer.config.command_line import add_config_arguments, place, run_command
from star_trainer.run.files import write_atomically, write_page
from star_trainer.studies.ablation.page import ablation_page
from star_trainer.studies.ablation.plan import Plan, read_plan
from star_trainer.studies.ablation.plot import plot_ablation
from star_trainer.studies.ablation.results import (
    Curve,
    answers_markdown,
    as_json,
    compare,
    markdown,
    read_curve,
    training_markdown,
)
from star_trainer.studies.ablation.runs import places, plan_runs, run_all
from star_trainer.studies.ablation.training import (
    Training,
    answers,
    by_seed,
    common_reward,
    read_training,
    training_blocks,
)
from star_trainer.studies.arms import Arm

_METHODS = get_args(Method)
# Unless others are asked for: those that train on the same rewards in the same way.
_ALLOCATIONS = [name for name in _METHODS if name not in REWARD_GRADIENT_METHODS]

_ABOUT_SECONDS = (
    "s/iter: median seconds of an iteration's rollout, reward and update, under all that ran at the same time; "
    "what a method costs is measured by star-cost."
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="star-ablate",
        description="Train with several methods and seeds, equal in everything else, and compare them with a baseline.",
        epilog=(
            "examples:\n"
            "  star-ablate tiny                                             all methods, five seeds\n"
            "  star-ablate tiny --methods star,uniform --seeds 3 train.iterations=20\n"
            '  star-ablate tiny --methods uniform,star --arm "half: method=star allocation.strength=0.5"\n'
            "  star-ablate docs/results/tiny_where_to_clip.yaml             a plan: arms, seeds and questions\n\n"
            "The same command goes on where it was stopped; runs that are done are not made again."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--methods", help=f"comma-separated (default: {','.join(_ALLOCATIONS)})")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="'NAME: key=value ...'",
        help="something else to compare: a name and the settings in which it differs; may be repeated",
    )
    parser.add_argument("--baseline", help="the arm that others are compared with (default: uniform, or the first)")
    parser.add_argument("--seeds", help="how many (5, the default, is 0 to 4), or which, comma-separated")
    parser.add_argument("--folder", type=place, help="where runs and results go (default: runs/ablation_CONFIG)")
    parser.add_argument("--jobs", type=int, help="runs at the same time (default: one per GPU, else one per core)")
    parser.add_argument("--compare", action="store_true", help="make no runs; compare what there is of them")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 0, 1 where a run failed, 2 with one line of explanation for arguments that cannot be used."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("star-ablate", lambda: _run(options), stopped="stopped; the same command goes on")


def _run(options: argparse.Namespace) -> int:
    plan = _plan(options)
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs: expected at least 1, got {options.jobs}")
    folder = Path(options.folder or f"runs/ablation_{Path(options.config).stem}")
    runs = plan_runs(plan.config, plan.overrides, plan.arms, plan.seeds, folder)
    failures = {} if options.compare else run_all(runs, places(options.jobs))
    curves = [read_curve(run) for run in runs if run.is_done()]
    if plan.baseline not in {curve.arm for curve in curves}:
        print(f"star-ablate: no run of the baseline {plan.baseline} is done, see {folder}", file=sys.stderr)
        return 1
    rows = compare(curves, plan.baseline)
    trainings = [read_training(run) for run in runs]
    blocks, reached = training_blocks(trainings, plan.baseline), common_reward(trainings)
    found = answers(plan.comparisons, _measured(curves, trainings, plan.first_iteration))
    tables = [markdown(rows, plan.baseline), training_markdown(blocks, reached, plan.baseline)]
    tables += [answers_markdown(found)] if found else []
    table = "\n".join([*tables, f"{_ABOUT_SECONDS}\n"])
    settings = {
        "config": load_config(plan.config, plan.overrides).model_dump(mode="json"),
        "arms": {arm.name: list(arm.overrides) for arm in plan.arms},
        "seeds": plan.seeds,
        "baseline": plan.baseline,
        "failures": {f"{run.arm}, seed {run.seed}": words for run, words in failures.items()},
        "training": [asdict(block) for block in blocks],
        "iterations_to_common_reward": reached and {"reward": reached[0], "iterations": reached[1]},
        "comparisons": [asdict(answer) for answer in found],
    }
    write_atomically(folder / "ablation.json", as_json(curves, rows, settings).encode())
    write_atomically(folder / "ablation.md", table.encode())
    plot_ablation(curves, blocks, folder / "ablation.png")
    print(table)
    further = {"Training rewards": training_markdown(blocks, reached, plan.baseline)}
    further |= {"What was asked before": answers_markdown(found)} if found else {}
    content = (folder, plan.baseline, curves, rows, blocks, further, runs)
    report = write_page(folder / "report.html", lambda: ablation_page(*content))
    print(f"{report}table, plot and raw numbers are in {folder}")
    return 1 if failures else 0


def _measured(
    curves: Sequence[Curve], trainings: Sequence[Training], first: int
) -> dict[str, dict[str, dict[int, float]]]:
    """What the questions are asked of, by measure, arm and seed, from runs that are done."""
    done = {(curve.arm, curve.seed) for curve in curves}
    rewards = by_seed([training for training in trainings if (training.arm, training.seed) in done])
    measured = {
        f"training reward from iteration {first}": {
            arm: {seed: float(values[first - 1 :].mean()) for seed, values in runs.items()}
            for arm, runs in rewards.items()
        }
    }
    for curve in curves:
        for score, value in curve.final.items():
            measured.setdefault(f"held-out {score}", {}).setdefault(curve.arm, {})[curve.seed] = value
    return measured


def _plan(options: argparse.Namespace) -> Plan:
    """What the file of a plan says, or the options."""
    seeds = None if options.seeds is None else _seeds(options.seeds)
    if has_keys(path := Path(options.config).expanduser(), "arms"):
        for name in ("methods", "arm", "baseline"):
            if getattr(options, name):
                raise ConfigError(f"--{name}: expected none with a plan, got {getattr(options, name)}")
        plan = read_plan(path, options.overrides)
        return plan if seeds is None else replace(plan, seeds=seeds)
    arms = _arms(",".join(_ALLOCATIONS) if options.methods is None else options.methods, options.arm)
    baseline = options.baseline or ("uniform" if any(arm.name == "uniform" for arm in arms) else arms[0].name)
    if baseline not in [arm.name for arm in arms]:
        raise ConfigError(f"--baseline: expected one of {', '.join(arm.name for arm in arms)}, got {baseline!r}")
    return Plan(options.config, tuple(options.overrides), arms, seeds or list(range(5)), baseline)


def _arms(methods: str, others: Sequence[str]) -> list[Arm]:
    arms = []
    for name in filter(None, (part.strip() for part in methods.split(","))):
        if name not in _METHODS:
            raise ConfigError(f"--methods: expected some of {', '.join(_METHODS)}, got {name!r}")
        arms.append(Arm(name, (f"method={name}",)))
    arms += map(Arm.parse, others)
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) < len(names):
        raise ConfigError(f"--methods: expected arms with names of their own, got {', '.join(names) or 'none'}")
    return arms


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(f"--seeds: expected a number of seeds, or seeds separated by commas, got {text!r}")
    numbers = [int(part) for part in text.split(",")]
    seeds = list(range(numbers[0])) if "," not in text else list(dict.fromkeys(numbers))
    if not seeds:
        raise ConfigError("--seeds: expected at least one, got 0")
    return seeds


if __name__ == "__main__":
    sys.exit(main())
