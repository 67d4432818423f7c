"""The parts of `star-cost`: what is compared in each, measured in turn and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from star_trainer.studies.cost import cases
from star_trainer.studies.cost.cases import UNIFORM, Arm, Case
from star_trainer.studies.cost.flops import Counts, count
from star_trainer.studies.timing import Clock, Group, Member, Spread, measure, spread

# The share of the time that a group of each part gets.
SHARES = {"operations": 0.05, "rollout": 0.25, "update": 0.2, "iteration": 0.4}
_CAPTURES = (Arm("uniform", "unfused"), Arm("star"), Arm("star", "unfused"), Arm("star", "materialised"))
_MAPS = (Arm("star"), Arm("star", "unfused"))


@dataclass(frozen=True)
class Entry:
    """A member of a group: the call (none where nothing is timed), its operations, the bytes that it has to move."""

    arm: Arm
    call: Callable[[], object] | None
    flops: int | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What is compared. A call does `repeats` of what times and operations are said of."""

    name: str
    what: str
    baseline: Arm | None
    entries: tuple[Entry, ...]
    repeats: int = 1


def comparisons(part: str, case: Case | None, shapes: Case, counts: Counts) -> Iterator[Comparison]:
    """The groups of a part, of a case that is timed (or none) and the same case on the meta device."""
    makers = {"operations": _operations, "rollout": _rollout, "update": _update, "iteration": _iteration}
    yield from makers[part](case, shapes, counts)


def _operations(case: Case | None, shapes: Case, _: Counts) -> Iterator[Comparison]:
    config, layer = shapes.state.config, cases.layer_inputs(shapes)
    timed = None if case is None else cases.layer_inputs(case)

    def attend(arm: Arm) -> Entry:
        call = None if timed is None else cases.attend(timed, arm, config.backend)
        return Entry(arm, call, count(cases.attend(layer, arm, config.backend)))

    batch, heads, tokens, head_dim = layer.query.shape
    image, units = layer.num_image_tokens, layer.unit_weights.shape[2]
    kind, text = ("cross", layer.key.shape[2]) if tokens == image else ("joint", tokens - image)
    shape = f"B {batch}, {heads} heads x {head_dim}, {image} + {text} tokens, K {units}"
    yield Comparison("attention", f"one {kind} attention, {shape}", _CAPTURES[0], tuple(map(attend, _CAPTURES)))

    def make_map(arm: Arm) -> Entry:
        call, moved = cases.make_map(case or shapes, timed or layer, arm)
        return Entry(arm, None if case is None else call, bytes=moved)

    rows = len(layer.unit_weights)
    yield Comparison("allocation map", f"B {rows}, {image} tokens, K {units}", None, tuple(map(make_map, _MAPS)))

    def lose(arm: Arm) -> Entry:
        call, moved = cases.lose(case or shapes, arm)
        return Entry(arm, None if case is None else call, bytes=moved)

    prompts, samples = shapes.update_groups
    latent = " x ".join(map(str, (prompts * samples, *shapes.state.policy.latent_shape)))
    entries = tuple(map(lose, cases.UPDATE_ARMS))
    yield Comparison("policy loss", f"forward and backward, {latent}", UNIFORM, entries)


def _rollout(case: Case | None, shapes: Case, counts: Counts) -> Iterator[Comparison]:
    def entry(arm: Arm) -> Entry:
        call = None if case is None else cases.roll_out(case, arm, cases.ROLLOUT_STEPS)
        return Entry(arm, call, counts.rollout_step(arm))

    guided = " under guidance" if shapes.state.config.rollout.guidance_scale > 1.0 else ""
    what = f"{shapes.rollout_batch} samples{guided}"
    entries = tuple(map(entry, cases.ROLLOUT_ARMS))
    yield Comparison("rollout step", what, UNIFORM, entries, repeats=cases.ROLLOUT_STEPS)


def _update(case: Case | None, shapes: Case, counts: Counts) -> Iterator[Comparison]:
    update = None if case is None else cases.update_once(case)
    prompts, samples = shapes.update_groups
    entries = tuple(
        Entry(arm, None if update is None else update(arm), counts.update(arm)) for arm in cases.UPDATE_ARMS
    )
    yield Comparison("update", f"{prompts * samples} samples, one denoising step", UNIFORM, entries)


def _iteration(case: Case | None, shapes: Case, counts: Counts) -> Iterator[Comparison]:
    section = shapes.state.config.rollout
    entries = tuple(
        Entry(arm, None if case is None else cases.iterate(case, arm), counts.iteration(arm))
        for arm in cases.ITERATION_ARMS
    )
    what = f"{section.prompts} prompts x {section.samples} samples, {section.steps} steps"
    yield Comparison("iteration", what, UNIFORM, entries)


def measured(comparison: Comparison, clock: Clock, budget: float) -> dict[str, Any]:
    """The comparison as JSON has it: seconds, bytes, ratios round by round to uniform of the same implementation."""
    members = [
        Member(str(entry.arm), entry.call, entry.arm == comparison.baseline)
        for entry in comparison.entries
        if entry.call is not None
    ]
    group = measure(members, clock, name=comparison.name, budget=budget)
    return _as_dict(comparison, group)


def counted(comparison: Comparison) -> dict[str, Any]:
    """The same without times and memory."""
    return _as_dict(comparison, None)


def _as_dict(comparison: Comparison, group: Group | None) -> dict[str, Any]:
    arms = [entry.arm for entry in comparison.entries]
    return {
        "name": comparison.name,
        "what": comparison.what,
        "members": [
            _member(entry, _baseline(entry.arm, arms, comparison), comparison, group) for entry in comparison.entries
        ],
    }


def _baseline(arm: Arm, arms: Sequence[Arm], comparison: Comparison) -> Arm | None:
    return arm.baseline if arm.baseline in arms else comparison.baseline


def _member(entry: Entry, baseline: Arm | None, comparison: Comparison, group: Group | None) -> dict[str, Any]:
    described: dict[str, Any] = {
        "method": entry.arm.method,
        "variant": entry.arm.variant,
        "baseline": None if baseline is None else str(baseline),
        "flops": entry.flops,
        "bytes": entry.bytes,
    }
    if group is None:
        return described
    measurement = group[str(entry.arm)]
    ratio = None if baseline is None else group.ratio(str(entry.arm), to=str(baseline))
    return described | {
        "rounds": len(measurement.seconds),
        "seconds": vars(_divided(spread(measurement.seconds), comparison.repeats)),
        "ratio": None if ratio is None else vars(ratio),
        "peak_bytes": measurement.peak_bytes,
    }


def _divided(values: Spread, by: int) -> Spread:
    return Spread(*(value / by for value in (values.median, values.q1, values.q3, values.low, values.high)))
