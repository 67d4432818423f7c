"""``star-sensitivity``: does the map point at what the reward depends on, and does it make the gradient less noisy?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from star_trainer.config import Allocation, Config, ConfigError, load_config
from star_trainer.config.command_line import add_config_arguments, place, quieten, run_command
from star_trainer.run.files import write_atomically, write_page
from star_trainer.studies.arms import Arm

PARTS = ("objects", "edits", "gradients")
# Shown, of all that are measured.
_CASES = 6
_ARMS = ("star", "uniform", "shuffled", "inverted", "oracle")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="star-sensitivity",
        description="Compare allocation maps with what the reward depends on, and measure signal and noise of the "
        "policy gradient under each allocation of the same rollouts.",
        epilog=(
            "examples:\n"
            "  star-sensitivity tiny\n"
            "  star-sensitivity tiny --parts gradients --batches 200 train.batch_size=96\n"
            '  star-sensitivity tiny --parts gradients --arm "half: allocation.strength=0.5"\n'
            "  star-sensitivity tiny --parts gradients --arms star,uniform --progress 20 --progress-lengths 1,10\n"
            "  star-sensitivity tiny run.folder=runs/tiny_star_0 --trained     after that run instead of before\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts for objects and edits (default: 64)")
    parser.add_argument(
        "--share", type=float, default=0.2, help="part of the image that edits paint over (default: 0.2)"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=100,
        help="rollout batches for gradients (default: 100); Ctrl-C after three ends them and keeps what was measured",
    )
    parser.add_argument("--arms", default=",".join(_ARMS), help=f"of gradients, some of {', '.join(_ARMS)}")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="'NAME: allocation.key=value ...'",
        help="of gradients: other settings of the allocation, on the same rollouts; may be repeated",
    )
    parser.add_argument(
        "--progress",
        type=int,
        default=0,
        metavar="BATCHES",
        help="with gradients: rollout batches that judge what equally long steps along the arms' mean gradients gain, "
        "each sampled once, and once more per arm for even and for velocity weights of the steps (default: none)",
    )
    parser.add_argument(
        "--progress-lengths",
        help="of those steps, comma-separated, in steps of the optimiser, each of which moves every parameter by about "
        "the learning rate (default: 10)",
    )
    parser.add_argument(
        "--trained", action="store_true", help="measure the averaged weights in run.folder's newest checkpoint"
    )
    parser.add_argument(
        "--folder",
        type=place,
        help="where results go (default: runs/sensitivity_CONFIG); parts that are there and not asked for stay",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with one line of explanation for what cannot be used."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("star-sensitivity", lambda: _run(options), stopped="stopped before there were results")


def _run(options: argparse.Namespace) -> None:
    config, parts, arms = _check(options)
    others = _others(options, config)
    quieten()
    report(config, parts, arms, others, options)


def _check(options: argparse.Namespace) -> tuple[Config, list[str], list[str]]:
    config = load_config(options.config, [*options.overrides, "method=star"])
    parts = [part.strip() for part in options.parts.split(",") if part.strip()]
    arms = [arm.strip() for arm in options.arms.split(",") if arm.strip()]
    for name, given, known in (("--parts", parts, PARTS), ("--arms", arms, _ARMS)):
        if not given or any(entry not in known for entry in given):
            raise ConfigError(f"{name}: expected some of {', '.join(known)}, got {', '.join(given) or 'none'}")
    least_of_progress = 2 if options.progress else 0
    for name, number, least in (
        ("--prompts", options.prompts, 2),
        ("--batches", options.batches, 3),
        ("--progress", options.progress, least_of_progress),
    ):
        if number < least:
            raise ConfigError(f"{name}: expected at least {least}, got {number}")
    if options.progress_lengths is not None and not options.progress:
        raise ConfigError("--progress-lengths: expected none without --progress")
    _lengths(options.progress_lengths)
    if not 0.0 < options.share < 1.0:
        raise ConfigError(f"--share: expected between 0 and 1, got {options.share}")
    if config.prompts.source != "scenes" and ("objects" in parts or "oracle" in arms):
        raise ConfigError("--parts: objects, and the arm oracle, need prompts.source=scenes, where the truth is known")
    for name in ("arm", "progress"):
        if getattr(options, name) and "gradients" not in parts:
            raise ConfigError(f"--{name}: expected none without gradients among --parts")
    if "gradients" in parts and "shuffled" in arms and config.rollout.prompts < 2:
        raise ConfigError("rollout.prompts: expected at least 2 for the arm shuffled, which exchanges maps")
    return config, parts, arms


def _lengths(text: str | None) -> list[float]:
    if text is None:
        return [10.0]
    parts = text.split(",")
    numbers = [float(part) for part in parts if re.fullmatch(r"\d+(\.\d+)?", part)]
    if len(numbers) < len(parts) or min(numbers) <= 0.0 or len(set(numbers)) < len(numbers):
        raise ConfigError(f"--progress-lengths: expected numbers above 0, each once, with commas, got {text!r}")
    return numbers


def _others(options: argparse.Namespace, config: Config) -> dict[str, Allocation]:
    """The allocation settings of each --arm."""
    others: dict[str, Allocation] = {}
    for arm in map(Arm.parse, options.arm):
        if arm.name in (*_ARMS, *others):
            raise ConfigError(f"--arm: expected a name of its own, got {arm.name}")
        try:
            other = load_config(options.config, [*options.overrides, "method=star", *arm.overrides])
        except ConfigError as error:
            raise ConfigError(f"--arm: {arm.name}: {error}") from error
        if not arm.overrides or other.model_copy(update={"allocation": config.allocation}) != config:
            raise ConfigError(f"--arm: {arm.name}: expected settings of allocation, which share the same rollouts")
        others[arm.name] = other.allocation
    return others


def report(
    config: Config,
    parts: Sequence[str],
    arms: Sequence[str],
    others: Mapping[str, Allocation],
    options: argparse.Namespace,
) -> None:
    """Measure what was asked for and write table, plots and numbers; a fault after three batches is raised after it."""
    from star_trainer.prompts.units import UnitExtractor
    from star_trainer.rewards import load_terms, weighted_sum
    from star_trainer.run.inputs import check_prompts, load_prompts
    from star_trainer.run.randomness import numpy_stream
    from star_trainer.run.state import build_state
    from star_trainer.studies.sensitivity import gradients, maps, plots
    from star_trainer.studies.sensitivity.progress import measure_progress, progress_table
    from star_trainer.studies.sensitivity.results import kept_results

    check_prompts(config)
    draw_training, draw_held_out = load_prompts(config.prompts)
    terms, extractor = load_terms(config.reward), UnitExtractor(config.units)
    reward = weighted_sum(config.reward, terms)
    folder = Path(options.folder or f"runs/sensitivity_{Path(options.config).stem}")
    # Now, not after an hour of measuring, if it cannot be made.
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"config": _plain(config.model_dump(mode="json")), "prompts": options.prompts, "share": options.share}
    kept = kept_results(folder, list(parts), settings | {"trained": options.trained})
    kept_scores, signals, steps, progress, kept_arms = kept
    state = build_state(config)
    if options.trained and not state.take_average(Path(config.run.folder) / "checkpoints"):
        raise ConfigError(f"run.folder: expected a run with a checkpoint for --trained, got {config.run.folder}")
    for name, allocation in others.items():
        varied = config.model_copy(update={"allocation": allocation})
        try:
            state.policy.check(varied)
        except ConfigError as error:
            raise ConfigError(f"--arm: {name}: {error}") from error
    scores, edits = kept_scores, None
    held_out = draw_held_out(numpy_stream(config.run.seed, "held-out"), options.prompts)
    if "objects" in parts or "edits" in parts:
        cases = maps.sample_cases(state, extractor.fill(held_out), layers="objects" in parts)
        if "objects" in parts:
            scores += maps.overlap(cases)
        if "edits" in parts:
            rng = numpy_stream(config.run.seed, "edits")
            scores += maps.edits(cases, reward, options.share, rng)
            scores += maps.regional_correlation(cases, reward)
            scores += _differentiable(terms, cases, state)
            edits = _draw_cases(cases, reward, options.share, folder / "cases.png")
    failure: Exception | None = None
    if "gradients" in parts:
        measured = gradients.measure_gradients(
            state, draw_training, reward.each, arms, options.batches, extractor.fill, others
        )
        signals, steps, failure = measured.signals, measured.steps, measured.failure
        if options.progress and measured.is_whole:
            means = {
                (arm, kind.removeprefix(gradients.SUM).removeprefix(", ") or "none"): own
                for (arm, kind), own in measured.means.items()
                if kind in (gradients.SUM, f"{gradients.SUM}, velocity")
            }
            lengths = _lengths(options.progress_lengths)
            judged = measure_progress(state, draw_training, reward, means, options.progress, lengths, extractor.fill)
            progress = judged.rows
            failure = judged.failure if isinstance(judged.failure, Exception) else None
    table = "\n".join([tables(scores, signals), step_tables(steps), progress_table(progress)])
    content = {
        **settings,
        "trained": options.trained,
        "iteration": state.iteration,
        "arms": {**kept_arms, **{name: allocation.model_dump(mode="json") for name, allocation in others.items()}},
        "scores": maps.as_rows(scores),
        "gradients": [dataclasses.asdict(signal) for signal in signals],
        "steps": [dataclasses.asdict(own) for own in steps],
        "progress": [dataclasses.asdict(own) for own in progress],
    }
    write_atomically(folder / "sensitivity.json", json.dumps(_plain(content), indent=1).encode())
    write_atomically(folder / "sensitivity.md", table.encode())
    plots.plot_by_step(scores, signals, folder / "sensitivity.png")
    print(table)
    shown = held_out[:_CASES]
    report = write_page(
        folder / "report.html", lambda: _page(state, extractor.fill(shown), scores, signals, table, edits)
    )
    print(f"{report}tables, plots and numbers are in {folder}")
    if failure is not None:
        raise failure


def _page(state: Any, prompts: Any, scores: Any, signals: Any, table: str, edits: Any) -> bytes:
    from star_trainer.run.denoising import watch_denoising
    from star_trainer.run.randomness import stream
    from star_trainer.studies.sensitivity.page import sensitivity_page

    config = state.config
    # The noise of `maps.sample_cases`.
    noise = [stream(config.run.seed, "sensitivity", place) for place in range(len(prompts))]
    rollout = config.rollout
    seen = watch_denoising(state.policy, config, prompts, noise, rollout.guidance_scale, steps=rollout.steps, maps=True)
    return sensitivity_page(config, state.iteration, scores, signals, table, seen.denoising(state.policy), edits)


def _differentiable(terms: Any, cases: Any, state: Any) -> list[Any]:
    """The correlation with the gradient of the first term of the reward that has one."""
    from star_trainer.rewards import NotDifferentiable, differentiable_terms
    from star_trainer.studies.sensitivity import maps

    for name, term in terms.items():
        try:
            found = differentiable_terms({name: term})
        except NotDifferentiable:
            continue
        return maps.gradient_correlation(cases, state.policy, found[name])
    return []


def _draw_cases(cases: Any, reward: Any, share: float, path: Path, count: int = _CASES) -> Any:
    """Draw the first cases, and return their images before and after the edits with their rewards."""
    import numpy as np

    from star_trainer.report import Pairs
    from star_trainer.studies.sensitivity import maps, plots

    shown = dataclasses.replace(
        cases,
        prompts=cases.prompts[:count],
        images=cases.images[:count],
        latents=cases.latents[:count],
        maps={name: values[:, :count] for name, values in cases.maps.items()},
    )
    steps = sorted({0, len(shown.maps["map"]) // 2, len(shown.maps["map"]) - 1})
    inside = np.stack([maps.top_region(each, share) for each in shown.maps["map"][steps[1 if len(steps) > 1 else 0]]])
    edited = {
        "inside": maps.edit(shown.images, inside),
        "outside": maps.edit(shown.images, np.stack([maps.farthest(region) for region in inside])),
    }
    rewards = {name: reward(images, shown.prompts) for name, images in {"before": shown.images, **edited}.items()}
    plots.plot_cases(shown, edited, rewards, steps, path)
    return Pairs([prompt.text for prompt in shown.prompts], {"before": shown.images, **edited}, rewards)


def tables(scores: Sequence[Any], signals: Sequence[Any]) -> str:
    """Markdown: the scores as means over the steps and by step, and the gradients' signal and noise."""
    lines: list[str] = []
    steps = sorted({score.step for score in scores})
    for what in dict.fromkeys(score.what for score in scores):
        lines += [f"| {what} | " + " | ".join(f"step {step + 1}" for step in steps) + " | n |"]
        lines += ["|---" * (len(steps) + 2) + "|"]
        of = [score for score in scores if score.what == what]
        for name in dict.fromkeys(score.map for score in of):
            row = [score for score in of if score.map == name]
            defined = [score.n for score in row if math.isfinite(score.value)]
            cells = [_mean(score) for score in row]
            lines += [f"| {name} | {' | '.join(cells)} | {min(defined, default=0)} |"]
        lines += [""]
    if signals:
        lines += [
            "| gradient | step | signal / noise | less uniform's | less star's | signal / noise along uniform's mean "
            "| cosine to it | cosine of two batches | norm² of mean | trace of covariance | n |"
        ]
        lines += ["|---" * 11 + "|"]
        for signal in sorted(signals, key=lambda found: (not found.step.startswith("all"), found.step)):
            step = signal.step if signal.step.startswith("all") else str(int(signal.step) + 1)
            lines += [
                f"| {signal.arm} | {step} | {_interval(signal.ratio)} | {_interval(signal.ratio_less_uniform)} | "
                f"{_interval(signal.ratio_less_star)} | {_interval(signal.ratio_along_uniform)} | "
                f"{_interval(signal.cosine_to_uniform)} | {_interval(signal.cosine)} | "
                f"{signal.squared_mean:.3g} | {signal.covariance_trace:.3g} | {signal.batches} |"
            ]
        lines += [""]
    return "\n".join(lines)


def step_tables(relations: Sequence[Any]) -> str:
    """Markdown: how much each kind of temporal weights makes of each step, and the cosines between steps."""
    if not relations:
        return ""
    numbers = [step + 1 for step in relations[0].steps]
    lines = ["| weights of the steps | " + " | ".join(f"step {number}" for number in numbers) + " |"]
    lines += ["|---" * (len(numbers) + 1) + "|"]
    rows = [kind for kind in relations[0].weights if kind != "best"]
    named = [(kind, relations[0].weights[kind]) for kind in rows]
    named += [(f"best, {own.arm}", own.weights["best"]) for own in relations if "best" in own.weights]
    lines += [f"| {name} | {' | '.join(f'{weight:.2f}' for weight in weights)} |" for name, weights in named]
    pairs = [(one, other) for other in range(len(numbers)) for one in range(other)]
    if pairs:
        titles = " | ".join(f"{numbers[one]}, {numbers[other]}" for one, other in pairs)
        lines += ["", f"| cosine of the expected gradients of steps | {titles} |", "|---" * (len(pairs) + 1) + "|"]
        for own in relations:
            cells = [_interval(own.cosines[one][other]) for one, other in pairs]
            lines += [f"| {own.arm} | {' | '.join(cells)} |"]
    return "\n".join([*lines, ""])


def _mean(score: Any) -> str:
    return f"{score.value:.3f} ± {score.high - score.value:.3f}" if math.isfinite(score.value) else ""


def _interval(estimate: Any) -> str:
    if estimate is None or not math.isfinite(estimate.value):
        return ""
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def _plain(value: Any) -> Any:
    """`value` with null for what is not a number, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
