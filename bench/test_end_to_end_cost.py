"""What allocation costs a whole rollout and a whole update, through the trainer's functions on the tiny pipeline."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest
from star_trainer.algorithms.advantages import group_advantages
from star_trainer.algorithms.policy_gradient import update
from star_trainer.algorithms.rollout import Rollout
from star_trainer.config import Config, load_config
from star_trainer.families.conditioning import Conditioning
from star_trainer.prompts import Prompt
from star_trainer.run.inputs import load_prompts
from star_trainer.run.randomness import numpy_stream, stream
from star_trainer.run.state import TrainingState, build_state
from star_trainer.sampling import Trajectory, denoise, text_units

METHODS = {"uniform": "uniform", "STAR": "star"}
BACKENDS = {"fused": "auto", "eager": "reference"}
STEPS = 4
PRECISE_SECONDS = 90.0
SETTINGS = (
    "rollout.prompts=4",
    "rollout.samples=8",
    f"rollout.steps={STEPS}",
    "rollout.sde_steps=2",
    "train.updates=1",
    # The same work as with any other rate, and weights that do not wander off over hundreds of updates.
    "train.learning_rate=1e-12",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """The tiny pipeline with its adapters, some prompts, and the conditioning of each prompt's group of samples."""

    state: TrainingState
    prompts: list[Prompt]
    conditioning: Conditioning

    @property
    def batch(self) -> int:
        return len(self.conditioning)

    def with_method(self, method: str, backend: str) -> TrainingState:
        config: Config = self.state.config.model_copy(update={"method": method, "backend": backend})
        return dataclasses.replace(self.state, config=config)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("end_to_end")
    state = build_state(load_config("tiny", [*SETTINGS, f"run.folder={folder}"]))
    draw_training, _ = load_prompts(state.config.prompts)
    prompts = draw_training(numpy_stream(0, "prompts"), state.config.rollout.prompts)
    conditioning = state.policy.encode([prompt.text for prompt in prompts])
    return Case(state, prompts, conditioning.repeat_interleave(state.config.rollout.samples))


def roll_out(case: Case, method: str, backend: str) -> Trajectory:
    """All denoising steps of one batch, as a training run does them."""
    state = case.with_method(method, backend)
    section = state.config.rollout
    units = None
    if method == "star":
        units = text_units(state.policy, case.prompts).repeat_interleave(section.samples)
    return denoise(
        state.policy,
        case.conditioning,
        steps=section.steps,
        kind=section.sampler,
        generator=stream(0, "rollout"),
        eta=section.eta,
        noisy=range(section.noisy_steps),
        units=units,
        allocation=state.config.allocation,
        backend=backend,
    )


def describe(case: Case) -> str:
    height, width = case.state.policy.grid
    return f"tiny pipeline, B {case.batch}, {height * width} image tokens"


def measure_methods(
    measure: Callable[..., None], group: str, make: Callable[[str, str], Callable[[], object]], *, precise: bool
) -> None:
    """The methods on the kernels and on the definitions; precisely, on the kernels alone and for longer."""
    for label, backend in list(BACKENDS.items())[: 1 if precise else None]:
        for method_label, method in METHODS.items():
            measure(
                make(method, backend),
                group=f"{group}, precisely" if precise else group,
                name=f"{method_label}, {label}",
                baseline=(label, method) == ("fused", "uniform"),
                budget=PRECISE_SECONDS if precise else None,
            )


PRECISION = pytest.mark.parametrize("precise", [False, pytest.param(True, marks=pytest.mark.full, id="precisely")])


@PRECISION
def test_rollout(measure: Callable[..., None], case: Case, precise: bool) -> None:
    group = f"rollout of {STEPS} steps, {describe(case)}"
    measure_methods(measure, group, lambda *which: functools.partial(roll_out, case, *which), precise=precise)


@PRECISION
def test_update(measure: Callable[..., None], case: Case, precise: bool) -> None:
    trajectory = roll_out(case, "star", "auto")
    rewards = np.random.default_rng(0).random(case.batch)
    _, timesteps = case.state.policy.schedule(STEPS)
    # An update does not look at rewards: the advantages are made from them before.
    samples = case.state.config.rollout.samples
    conditioning, places = case.conditioning[::samples], np.arange(case.batch)
    rollout = Rollout(trajectory, timesteps, conditioning, rewards, case.prompts, places, samples, seconds={})
    advantages = group_advantages(rewards, case.state.config.rollout.samples)

    def make(method: str, backend: str) -> Callable[[], object]:
        return functools.partial(update, case.with_method(method, backend), rollout, advantages, 0)

    measure_methods(measure, f"update on 2 steps, {describe(case)}", make, precise=precise)
