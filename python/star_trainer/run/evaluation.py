"""Held-out evaluation: the same prompts and the same noise every time, no sampler noise, paired comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from star_trainer.config import Config
from star_trainer.families.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.rewards import GENEVAL, HeldOutScorer, RewardError
from star_trainer.rewards.diversity import Diversity
from star_trainer.run.denoising import Watched, watch_denoising
from star_trainer.run.files import write_atomically
from star_trainer.run.pictures import before_after_sheet
from star_trainer.run.processes import fail_together, gather, gather_array
from star_trainer.run.randomness import stream
from star_trainer.run.state import TrainingState
from star_trainer.run.statistics import PairedDifference, paired_difference
from star_trainer.sampling import NonFiniteError, denoise


@dataclass(frozen=True)
class Evaluation:
    """Scores [N] of N held-out prompts' images by reward name, and the first few of the images [n, H, W, 3] uint8.

    `measured` stands for the prompts and settings that were measured with; evaluations of different ones do not pair.
    """

    images: np.ndarray
    scores: dict[str, np.ndarray]
    measured: str | None = None

    def __len__(self) -> int:
        return len(next(iter(self.scores.values())))

    def means(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.scores.items()}

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensors = {f"score/{name}": torch.from_numpy(values) for name, values in self.scores.items()}
        said = None if self.measured is None else {"measured": self.measured}
        write_atomically(path, save({"images": torch.from_numpy(self.images), **tensors}, said))

    @classmethod
    def load(cls, path: Path) -> Evaluation | None:
        """Read what `save` wrote; None where it is missing or cannot be read."""
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
            tensors = load_file(path)
        except (OSError, SafetensorError):
            return None
        if "images" not in tensors:
            return None
        scores = {name.removeprefix("score/"): t.numpy() for name, t in tensors.items() if name != "images"}
        return cls(tensors["images"].numpy(), scores, said.get("measured"))


def evaluate(
    policy: Policy,
    config: Config,
    prompts: Sequence[Prompt],
    scorer: HeldOutScorer,
    accelerator: Accelerator,
    diversity: Diversity | None = None,
) -> Evaluation:
    """Sample one image per prompt with the pipeline's own (noise-free) sampler and score it.

    The noise of a prompt depends on its place in the list alone: evaluations of fewer prompts, or by more processes,
    see the same noise, and the same images up to rounding. The first ``evaluation.pictures`` images are kept.
    With `diversity` there are ``evaluation.group`` images of a prompt, which it compares.

    Raises:
        RewardError: a score that cannot be had, in this or another process.
    """
    # As many prompts for each process, so that all run the model equally often; the last process may repeat some.
    share = -(-len(prompts) // accelerator.num_processes)
    own = [min(accelerator.process_index * share + i, len(prompts) - 1) for i in range(share)]
    policy.encode_ahead([prompts[place].text for place in own])
    images: list[np.ndarray] = []
    scores: dict[str, list[np.ndarray]] = {}
    for first in range(0, share, config.rollout.batch_size):
        places = own[first : first + config.rollout.batch_size]
        batch = [prompts[place] for place in places]
        judge = partial(_draw_and_score, policy, config, places, batch, scorer, diversity)
        decoded, found = fail_together(accelerator, judge, RewardError, NonFiniteError)
        images.append(decoded[: max(0, config.evaluation.pictures - first)])
        for name, values in found.items():
            scores.setdefault(name, []).append(values)
    shown = gather_array(accelerator, np.concatenate(images))[: min(config.evaluation.pictures, len(prompts))]
    gathered = {name: gather_array(accelerator, np.concatenate(parts)) for name, parts in scores.items()}
    return Evaluation(shown, {name: values[: len(prompts)] for name, values in gathered.items()})


def _draw_and_score(
    policy: Policy,
    config: Config,
    places: Sequence[int],
    prompts: Sequence[Prompt],
    scorer: HeldOutScorer,
    diversity: Diversity | None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    conditioning = policy.encode([prompt.text for prompt in prompts])

    def draw(name: str, *other: int) -> np.ndarray:
        trajectory = denoise(
            policy,
            conditioning,
            steps=config.evaluation.steps,
            kind="ode",
            generator=[stream(config.run.seed, name, place, *other) for place in places],
            guidance_scale=config.evaluation.guidance_scale,
            backend=config.backend,
        )
        return policy.decode(trajectory.latents[-1])

    images = draw("evaluation")
    scores = scorer(images, prompts)
    if diversity is not None:
        others = [draw("diversity", other) for other in range(1, config.evaluation.group)]
        scores = {**scores, "diversity": diversity(np.stack([images, *others], axis=1))}
    return images, scores


def draw_comparison(prompts: Sequence[str], before: Evaluation, after: Evaluation, score: str, path: Path) -> None:
    """Draw the first images of two evaluations of the same prompts side by side, with one of their scores, as PNG.

    As many as there are `prompts` and images of both, whose number is a setting that a resumed run may change; see
    `pictures.before_after_sheet`.
    """
    shown = min(len(prompts), len(before.images), len(after.images))
    scores = (before.scores[score][:shown], after.scores[score][:shown])
    before_after_sheet(prompts[:shown], before.images[:shown], after.images[:shown], *scores, path)


class HeldOut:
    """The held-out prompts of a run, and how the model that training started from and the present one do on them.

    Attributes:
        prompts: N prompts, whose order decides their noise.
        scorer: what scores images.
        diversity: what compares the images of a prompt, or None.
        base: of the pipeline's own weights, on all prompts.
        latest: of the newest weights that were evaluated, on as many of the first prompts, or None.
        latest_iteration: the iteration of `latest`, or -1.
    """

    def __init__(
        self,
        state: TrainingState,
        prompts: Sequence[Prompt],
        scorer: HeldOutScorer,
        diversity: Diversity | None = None,
    ) -> None:
        self.prompts = list(prompts)
        self.scorer, self.diversity = scorer, diversity
        self.base: Evaluation | None = None
        self.latest: Evaluation | None = None
        self.latest_iteration = -1
        self._state = state
        config = state.config
        settings = [config.evaluation.steps, config.evaluation.guidance_scale, config.run.seed]
        if diversity is not None:
            settings.append(config.evaluation.group)
        described = [settings, [[prompt.text, prompt.metadata] for prompt in self.prompts]]
        self._measured = hashlib.sha256(json.dumps(described, default=str).encode()).hexdigest()
        self._path = Path(state.config.run.folder) / "base_evaluation.safetensors"

    def take_up_base(self) -> bool:
        """Read the base evaluation that an earlier start of this run has left; False if any process finds none.

        One of other prompts or settings is none.
        """
        saved = Evaluation.load(self._path) if self._state.iteration > 0 else None
        if saved is not None and saved.measured is None and self._state.evaluates_as_before:
            # A run of before did not say: its settings, and as many prompts, must do.
            saved = replace(saved, measured=self._measured) if len(saved) == len(self.prompts) else None
        if saved is not None and saved.measured != self._measured:
            saved = None
        # To evaluate is the work of all processes: none may do it alone.
        if gather(self._state.accelerator, torch.tensor([saved is not None])).all():
            assert saved is not None
            self.base = saved
            self._keep_base()
        return self.base is not None

    def evaluate_base(self) -> Evaluation:
        """Evaluate the pipeline's own weights on all prompts, and keep that in the run's folder."""
        state = self._state
        untrained = state.iteration == 0 and state.config.model.adapter is None
        with nullcontext() if untrained else state.policy.base_weights():
            self.base = self._evaluate(self.prompts)
        self._keep_base()
        return self.base

    def _keep_base(self) -> None:
        assert self.base is not None
        if self._state.accelerator.is_main_process:
            self.base.save(self._path)

    def evaluate(self, count: int | None = None) -> Evaluation:
        """Evaluate the policy's present weights on the first `count` prompts, by default all."""
        self.latest, self.latest_iteration = self._evaluate(self.prompts[:count]), self._state.iteration
        return self.latest

    def _evaluate(self, prompts: Sequence[Prompt]) -> Evaluation:
        state = self._state
        found = evaluate(state.policy, state.config, prompts, self.scorer, state.accelerator, self.diversity)
        return replace(found, measured=self._measured)

    @property
    def names(self) -> list[str]:
        """The scores that the base and the latest evaluation have; a base of before may have fewer."""
        assert self.base is not None, "the base was evaluated"
        return [name for name in self.base.scores if self.latest is None or name in self.latest.scores]

    @property
    def shown(self) -> str:
        """The score that pictures are shown with: that of training, or how far images meet their prompts."""
        return next(name for name in ("reward", "graded", self.names[-1]) if name in self.names)

    def by_tag(self, evaluation: Evaluation) -> dict[str, float]:
        """GenEval's own measure by the tags of its prompts; empty where it is not among the scores."""
        values: dict[str, list[float]] = {}
        for prompt, value in zip(self.prompts, evaluation.scores.get(GENEVAL, ()), strict=False):
            values.setdefault(str(prompt.metadata.get("tag")), []).append(float(value))
        return {tag: float(np.mean(found)) for tag, found in sorted(values.items())}

    @property
    def is_complete(self) -> bool:
        """Whether the present weights were evaluated on all prompts."""
        done = self.latest is not None and len(self.latest) == len(self.prompts)
        return done and self.latest_iteration == self._state.iteration

    def watch(self, count: int) -> Watched:
        """How images of the first `count` prompts form by the present weights, with maps where training uses some."""
        state, config = self._state, self._state.config
        return watch_denoising(
            state.policy,
            config,
            self.prompts[:count],
            [stream(config.run.seed, "pictures", place) for place in range(count)],
            config.evaluation.guidance_scale,
            steps=config.rollout.steps,
            # Maps that no update has seen would only mislead.
            maps=config.uses_maps,
        )

    def watched(self) -> tuple[float, float] | None:
        """The held-out score that tells whether training helps, of the first weights and now, on the same prompts.

        That is one that training does not see, if there is one; None before the first evaluation.
        """
        if self.base is None or self.latest is None:
            return None
        unseen = ("graded", "geneval_strict", "reward", self.names[0])
        name = next(name for name in unseen if name in self.names)
        latest = self.latest.scores[name]
        return float(self.base.scores[name][: len(latest)].mean()), float(latest.mean())

    def comparison(self) -> dict[str, PairedDifference]:
        """By scorer, the latest evaluation less the base on the same prompts."""
        assert self.base is not None and self.latest is not None, "both were evaluated"
        texts = [prompt.text for prompt in self.prompts[: len(self.latest)]]
        return {
            name: paired_difference(self.base.scores[name][: len(texts)], self.latest.scores[name], texts)
            for name in self.names
        }
