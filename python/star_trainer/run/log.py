"""What a run shows and leaves behind: terminal lines, metrics, TensorBoard, pictures, the adapter and the summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from tqdm import tqdm

import star_kernels as sk
from star_trainer.algorithms.advantages import Advantages
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardFunction
from star_trainer.rewards.scenes import scene_graded, scene_strict
from star_trainer.run import pictures as report
from star_trainer.run.evaluation import Evaluation, PairedDifference, evaluate, paired_difference
from star_trainer.run.files import write_atomically
from star_trainer.run.processes import gather, is_sharded, whole
from star_trainer.run.randomness import stream
from star_trainer.run.state import TrainingState
from star_trainer.sampling import denoise, text_units


@dataclass(frozen=True)
class Iteration:
    """What an iteration gives: rewards [B] of all processes' samples, and this process's seconds and metrics by name.

    `advantages` are of the same samples, or None where samples are not compared with each other.
    """

    rewards: np.ndarray
    seconds: dict[str, float]
    metrics: dict[str, float]
    advantages: Advantages | None = None


class RunLog:
    """Records of one run; all output goes through here. Only the main process writes."""

    def __init__(
        self, state: TrainingState, held_out: Sequence[Prompt], reward: RewardFunction, *, resumed: bool
    ) -> None:
        config = state.config
        self.state = state
        self.held_out = list(held_out)
        self.folder = Path(config.run.folder)
        self.scorers: dict[str, RewardFunction] = {}
        if config.prompts.source == "scenes":
            self.scorers = {"strict": scene_strict, "graded": scene_graded}
        if not self.scorers or list(config.reward.terms) not in (["scene_strict"], ["scene_graded"]):
            self.scorers["reward"] = reward
        self.history: list[dict[str, float]] = []
        self.base: Evaluation | None = None
        self.latest: Evaluation | None = None
        self.latest_iteration = -1
        self._main = state.accelerator.is_main_process
        if self._main:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What an earlier start ended with is not what this one will.
            (self.folder / "summary.json").unlink(missing_ok=True)
            write_atomically(self.folder / "config.json", config.model_dump_json(indent=2).encode())
            self._take_up_history(resumed)
        # Events after the checkpoint that a resumed run goes on from come again.
        purge = {"tensorboard": {"purge_step": state.iteration + 1}} if resumed else {}
        state.accelerator.init_trackers("tensorboard", config=_flat(config.model_dump(mode="json")), init_kwargs=purge)
        here = [name for name, reason in sk.available_backends().items() if reason is None]
        self.say(f"backends: {', '.join(here)}")
        if resumed:
            self.say(f"going on from iteration {state.iteration} in {self.folder}")
        shown = self._main and config.run.progress
        self._bar = tqdm(
            total=config.train.iterations, initial=state.iteration, disable=None if shown else True, unit="iter"
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self.state.accelerator.end_training()

    def say(self, line: str, *, everywhere: bool = False) -> None:
        """Print a line above the progress bar, by the main process alone or by each that says so."""
        if self._main:
            tqdm.write(line)
        elif everywhere:
            tqdm.write(f"process {self.state.accelerator.process_index}: {line}")

    def _take_up_history(self, resumed: bool) -> None:
        """Keep what was logged up to the checkpoint; what came after it will be computed again."""
        path = self.folder / "metrics.jsonl"
        if resumed and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break
                if entry["iteration"] <= self.state.iteration:
                    self.history.append(entry)
        write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in self.history).encode())

    def _record(self, entry: dict[str, float]) -> None:
        self.history.append(entry)
        if self._main:
            with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        self.state.accelerator.log({k: v for k, v in entry.items() if k != "iteration"}, step=int(entry["iteration"]))

    def evaluated_base(self) -> None:
        """Evaluate the model that training started from, or read that from the run's folder, and log it."""
        path, state = self.folder / "base_evaluation.safetensors", self.state
        saved = Evaluation.load(path) if state.iteration > 0 else None
        # To evaluate is the work of all processes: none may do it alone.
        found_by_all = gather(state.accelerator, torch.tensor([saved is not None])).all()
        if saved is not None and found_by_all:
            self.base = saved
        else:
            self.say(f"measuring the base model on {len(self.held_out)} held-out prompts")
            with nullcontext() if state.iteration == 0 else state.policy.base_weights():
                self.base = evaluate(state.policy, state.config, self.held_out, self.scorers, state.accelerator)
            if self._main:
                self.base.save(path)
        if state.iteration == 0:
            self._record_evaluation(self.base)
        self.say(f"held-out, base model ({len(self.base)} prompts): {self._scores(self.base)}")

    def evaluated(self, evaluation: Evaluation) -> None:
        """Log an evaluation and draw the pictures; the policy must still have the weights that were evaluated."""
        self.latest, self.latest_iteration = evaluation, self.state.iteration
        self._record_evaluation(evaluation)
        count = len(evaluation)
        self.say(f"held-out after {self.state.iteration} iterations ({count} prompts): {self._scores(evaluation)}")
        # A picture of maps that no update has seen would only mislead.
        maps = self._maps(len(evaluation.images)) if self.state.config.uses_maps else None
        if self._main:
            self._draw(evaluation, maps)

    def _scores(self, evaluation: Evaluation) -> str:
        means = evaluation.means()
        return ", ".join(f"{name} {means[name]:.4f}" for name in self.scorers)

    def _record_evaluation(self, evaluation: Evaluation) -> None:
        means = {f"eval/{name}": value for name, value in evaluation.means().items()}
        entry = {"iteration": self.state.iteration, **means, "eval/prompts": len(evaluation)}
        if entry not in self.history:
            self._record(entry)

    def _draw(self, evaluation: Evaluation, maps: tuple[np.ndarray, np.ndarray] | None) -> None:
        """The pictures of an evaluation; `maps` are images [N, H, W, 3] and their allocation maps [N, T, h, w]."""
        assert self.base is not None
        shown = len(evaluation.images)
        texts = [prompt.text for prompt in self.held_out[:shown]]
        name = list(self.scorers)[-1]
        report.plot_curves(self.history, self.folder / "curves.png")
        report.before_after_sheet(
            texts,
            self.base.images[:shown],
            evaluation.images,
            self.base.scores[name][:shown],
            evaluation.scores[name][:shown],
            self.folder / "before_after.png",
        )
        if maps is not None:
            sigmas = self.state.policy.schedule(self.state.config.rollout.steps)[0][:-1].tolist()
            report.allocation_sheet(texts, *maps, sigmas, self.folder / "allocation_maps.png")
        for tracker in self.state.accelerator.trackers:
            if tracker.name == "tensorboard":
                step = self.state.iteration
                tracker.writer.add_images("samples", evaluation.images, step, dataformats="NHWC")
                if maps is not None:
                    # One row of maps per prompt, one map per denoising step.
                    rows = np.concatenate([np.concatenate(list(row), axis=1) for row in maps[1]], axis=0)
                    tracker.writer.add_image("allocation_maps", rows / max(rows.max(), 1e-6), step, dataformats="HW")

    def _maps(self, shown: int) -> tuple[np.ndarray, np.ndarray]:
        """Images [N, H, W, 3] of the shown prompts and their allocation maps by denoising step [N, T, h, w]."""
        state, config = self.state, self.state.config
        prompts = self.held_out[:shown]
        trajectory = denoise(
            state.policy,
            state.policy.encode([prompt.text for prompt in prompts]),
            steps=config.rollout.steps,
            kind="ode",
            generator=[stream(config.run.seed, "pictures", place) for place in range(shown)],
            guidance_scale=config.evaluation.guidance_scale,
            units=text_units(state.policy, prompts),
            allocation=config.allocation,
            backend=config.backend,
        )
        assert trajectory.weights is not None, "units were given"
        return state.policy.decode(trajectory.latents[-1]), trajectory.weights.transpose(0, 1).cpu().numpy()

    def iteration(self, done: Iteration) -> None:
        """Log one iteration: a line in the terminal, a line in metrics.jsonl, scalars in TensorBoard."""
        rewards, seconds, metrics, advantages = done.rewards, done.seconds, done.metrics, done.advantages
        groups = rewards.reshape(-1, self.state.config.rollout.samples)
        busy = max(seconds["reward"], 1e-9)
        compared = {} if advantages is None else {"reward/groups_without_spread": advantages.dropped}
        entry = {
            "iteration": self.state.iteration,
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/group_std": float(groups.std(axis=1).mean()),
            **compared,
            **{f"train/{name}": value for name, value in metrics.items()},
            **{f"seconds/{name}": value for name, value in seconds.items()},
            "seconds/reward_hidden_fraction": max(0.0, 1.0 - seconds["reward_wait"] / busy),
        }
        self._record(entry)
        self._bar.update(1)
        self.say(
            f"iter {self.state.iteration:>4} | reward {entry['reward/mean']:.3f} ± {entry['reward/std']:.3f} | "
            f"{_update(advantages, metrics)} | "
            f"rollout {seconds['rollout']:.1f} s, reward {seconds['reward']:.1f} s, update {seconds['update']:.1f} s"
        )

    def watched(self) -> tuple[float, float] | None:
        """The held-out score that tells whether training helps, of the first weights and now, on the same prompts.

        That is one that training does not see, if there is one; None before the first evaluation.
        """
        if self.base is None or self.latest is None:
            return None
        name = "graded" if "graded" in self.scorers else next(iter(self.scorers))
        latest = self.latest.scores[name]
        return float(self.base.scores[name][: len(latest)].mean()), float(latest.mean())

    def finish(self) -> dict[str, object]:
        """Write adapter and summary, print the comparison with the base model, and return the summary."""
        assert self.base is not None and self.latest is not None
        state = self.state
        with state.averaged_weights():
            export(state, self.folder)
        compared = {
            name: paired_difference(self.base.scores[name][: len(self.latest)], self.latest.scores[name])
            for name in self.scorers
        }
        summary: dict[str, object] = {
            "method": state.config.method,
            "seed": state.config.run.seed,
            "iterations": state.iteration,
            "stopped": state.stopped,
            "held_out_prompts": len(self.latest),
            "seconds": round(state.seconds(), 1),
            "base": {name: float(v[: len(self.latest)].mean()) for name, v in self.base.scores.items()},
            "final": self.latest.means(),
            "difference": {name: vars(difference) for name, difference in compared.items()},
        }
        if self._main:
            write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2).encode())
        self.say("")
        for name, difference in compared.items():
            before = float(self.base.scores[name][: len(self.latest)].mean())
            self.say(_comparison(name, before, self.latest.means()[name], difference))
        self.say(f"pictures, metrics and the adapter are in {self.folder}")
        return summary


def _update(advantages: Advantages | None, metrics: dict[str, float]) -> str:
    """What the update of an iteration measured, or why there was none."""
    spread = "" if advantages is None else f"no spread {advantages.dropped:4.0%} | "
    if advantages is not None and advantages.dropped == 1.0:
        return f"{spread}no group with spread: nothing to learn from, weights unchanged"
    if "gradient_norm" not in metrics:
        return f"{spread}every update skipped, weights unchanged"
    if "distance" in metrics:
        return f"distance {metrics['distance']:.2e} | grad {metrics['gradient_norm']:.2e}"
    kl = f"kl {metrics['kl']:.2e} | " if "kl" in metrics else ""
    return f"{spread}clip {metrics['clip_fraction']:6.2%} | {kl}grad {metrics['gradient_norm']:.2e}"


def _comparison(name: str, before: float, after: float, difference: PairedDifference) -> str:
    verdict = "better" if difference.low > 0 else "worse" if difference.high < 0 else "no clear difference"
    return (
        f"held-out {name:<7} before {before:.4f}  after {after:.4f}  difference {difference.mean:+.4f}, "
        f"95 % interval [{difference.low:+.4f}, {difference.high:+.4f}], p = {difference.p_value:.1e}: {verdict}"
    )


def export(state: TrainingState, folder: Path) -> None:
    """Save what was learnt in diffusers' formats: LoRA weights for `load_lora_weights`, or the whole transformer.

    Every process must call it; the main one writes.
    """
    model: Any = state.policy.model
    weights = None
    if is_sharded(model):
        weights = {}
        for name, tensor in model.state_dict().items():
            value = whole(tensor.detach())
            if state.accelerator.is_main_process:
                weights[name] = value.cpu()
    if not state.accelerator.is_main_process:
        return
    if state.config.model.lora is None:
        if weights is not None:
            with torch.device("meta"):
                model = SD3Transformer2DModel.from_config(model.config)
            model.load_state_dict(weights, assign=True)
        model.save_pretrained(folder / "transformer", safe_serialization=True)
        return
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(model, state_dict=weights)
    # The rank can be read off the weights; alpha, without which they load at another strength, only off this.
    (adapter,) = model.peft_config.values()
    type(state.policy.pipeline).save_lora_weights(
        folder / "adapter", transformer_lora_layers=layers, transformer_lora_adapter_metadata=adapter.to_dict()
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.key`, with values that TensorBoard takes."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
