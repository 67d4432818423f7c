"""What a run shows and leaves behind: terminal lines, metrics, trackers, pictures and the summary."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

import star_kernels as sk
from star_trainer.rewards import GENEVAL
from star_trainer.run import pictures
from star_trainer.run.denoising import Watched
from star_trainer.run.evaluation import Evaluation, HeldOut, draw_comparison
from star_trainer.run.files import write_atomically, write_page
from star_trainer.run.page import run_page
from star_trainer.run.processes import let_go_of_collectives
from star_trainer.run.state import TrainingState
from star_trainer.run.statistics import PairedDifference

# Seconds between reports of a run that goes on: one takes a few.
_BETWEEN_REPORTS = 60.0


@dataclass(frozen=True)
class Iteration:
    """What an iteration gives: rewards [B] of all processes' samples, and this process's seconds and metrics by name.

    `without_spread` is the share of groups whose samples cannot be told apart; None where they are not compared.
    `attention` is what computed that of the recorded layers; None where none was recorded.
    """

    rewards: np.ndarray
    seconds: dict[str, float]
    metrics: dict[str, float]
    without_spread: float | None = None
    attention: str | None = None


class RunLog:
    """Records of one run; all output goes through here. Only the main process writes."""

    def __init__(self, state: TrainingState, *, resumed: bool) -> None:
        config = state.config
        self.state = state
        self.folder = Path(config.run.folder)
        self.history: list[dict[str, float]] = []
        self._units_said = self._rules_said = False
        self._attention: str | None = None
        # By the main process, the latest evaluation's images that no page shows yet.
        self._unreported: Watched | None = None
        self._reported = time.monotonic()
        self._main = state.accelerator.is_main_process
        if self._main:
            self.folder.mkdir(parents=True, exist_ok=True)
            # What an earlier start ended with is not what this one will.
            (self.folder / "summary.json").unlink(missing_ok=True)
            write_atomically(self.folder / "config.json", config.model_dump_json(indent=2).encode())
            self._take_up_history(resumed)
        # Events after the checkpoint that a resumed run goes on from come again.
        options = {name: dict(said) for name, said in config.run.trackers.items()}
        if resumed and "tensorboard" in options:
            options["tensorboard"] = {"purge_step": state.iteration + 1} | options["tensorboard"]
        # TensorBoard's folder in the run's, and the project of those that have projects.
        project = "tensorboard" if options.keys() == {"tensorboard"} else config.run.project
        settings = _flat(config.model_dump(mode="json"))
        state.accelerator.init_trackers(project, config=settings, init_kwargs=options)
        here = [name for name, reason in sk.available_backends().items() if reason is None]
        self.say(f"backends: {', '.join(here)}")
        if resumed:
            self.say(f"going on from iteration {state.iteration} in {self.folder}")
        shown = self._main and config.run.progress
        self._warnings = _Warnings(state.accelerator.process_index)
        self._bar = tqdm(
            total=config.train.iterations, initial=state.iteration, disable=None if shown else True, unit="iter"
        )

    def __enter__(self) -> RunLog:
        logging.getLogger("star_trainer").addHandler(self._warnings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger("star_trainer").removeHandler(self._warnings)
        self._bar.close()
        let_go_of_collectives(self.state.accelerator)
        self.state.accelerator.end_training()

    def say(self, line: str) -> None:
        """Print a line above the progress bar, by the main process alone."""
        if self._main:
            tqdm.write(line)

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

    def evaluated_base(self, held_out: HeldOut) -> None:
        """Log how the model does that training started from."""
        assert held_out.base is not None, "the base was evaluated"
        if self.state.iteration == 0:
            self._record_evaluation(held_out, held_out.base)
        self.say(f"held-out, base model ({len(held_out.base)} prompts): {_scores(held_out, held_out.base)}")

    def evaluated(self, held_out: HeldOut) -> None:
        """Log the latest evaluation and draw the pictures; the policy must still have the weights of it."""
        base, evaluation, state = held_out.base, held_out.latest, self.state
        assert base is not None and evaluation is not None, "both were evaluated"
        self._record_evaluation(held_out, evaluation)
        count = len(evaluation)
        self.say(f"held-out after {state.iteration} iterations ({count} prompts): {_scores(held_out, evaluation)}")
        # Every process takes part; what becomes of it is the main one's.
        seen = held_out.watch(len(evaluation.images))
        if not self._main:
            return
        texts = [prompt.text for prompt in held_out.prompts[: len(evaluation.images)]]
        pictures.plot_curves(self.history, self.folder / "curves.png")
        draw_comparison(texts, base, evaluation, held_out.shown, self.folder / "before_after.png")
        if seen.weights is not None:
            path, symbol = self.folder / "allocation_maps.png", state.policy.family.noising.symbol
            pictures.allocation_sheet(texts, seen.images, seen.weights, seen.levels, path, symbol=symbol)
        self._send_pictures(evaluation.images, seen.weights)
        self._unreported = seen

    def report(self, held_out: HeldOut, *, last: bool = False) -> None:
        """Write report.html of the latest evaluation where that is not done: the `last`, or if a minute has passed."""
        seen = self._unreported
        if seen is None or not last and time.monotonic() - self._reported < _BETWEEN_REPORTS:
            return
        self._unreported, self._reported = None, time.monotonic()
        content = (self.state.config, self.state.iteration, self.history, held_out)
        policy = self.state.policy
        write_page(self.folder / "report.html", lambda: run_page(*content, seen.denoising(policy)), self.say)

    def _record_evaluation(self, held_out: HeldOut, evaluation: Evaluation) -> None:
        tags = held_out.by_tag(evaluation)
        means = {f"eval/{name}": value for name, value in evaluation.means().items()}
        entry = {"iteration": self.state.iteration, **means, "eval/prompts": len(evaluation)}
        entry |= {f"eval/{GENEVAL}/{tag}": value for tag, value in tags.items()}
        if entry not in self.history:
            self._record(entry)
        if tags:
            self.say(f"held-out {GENEVAL} by tag: {', '.join(f'{tag} {value:.4f}' for tag, value in tags.items())}")

    def _send_pictures(self, images: np.ndarray, maps: np.ndarray | None) -> None:
        """Give images [N, H, W, 3] and allocation maps [N, T, h, w] to the trackers that take them in this form."""
        shown = {"samples": images}
        if maps is not None:
            # One row of maps per prompt, one map per denoising step.
            rows = np.concatenate([np.concatenate(list(row), axis=1) for row in maps], axis=0)
            scaled = np.round(255.0 * rows / max(rows.max(), 1e-6)).astype(np.uint8)
            shown["allocation_maps"] = np.repeat(scaled[None, ..., None], 3, axis=-1)
        for tracker in self.state.accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(shown, step=self.state.iteration, **layout)

    def units(self, metrics: dict[str, float]) -> None:
        """Say once when units of an iteration's prompts have no token, or are by the rules for want of others."""
        if not self._units_said and (metrics["units_missing"] or metrics["prompts_without_units"]):
            self._units_said = True
            self.say(
                f"{metrics['units_missing']:.0%} of this iteration's text units have no token, and "
                f"{metrics['prompts_without_units']:.0%} of its prompts no unit: their maps are uniform"
            )
        if not self._rules_said and metrics.get("units_by_rules_instead"):
            self._rules_said = True
            self.say(
                f"{metrics['units_by_rules_instead']:.0f} prompts so far have units by the rules, which know "
                "English alone: the chat model gave no usable ones"
            )

    def iteration(self, done: Iteration) -> None:
        """Log one iteration: a line in the terminal, a line in metrics.jsonl, scalars in the trackers.

        `seconds/reward_hidden_fraction` is the measured share of the reward's seconds that passed while this process
        was still sampling. It says that the reward was not waited for, not that it was free: on the GPU of the
        sampling, or on its cores, it makes `seconds/rollout` longer.
        """
        if done.attention not in (None, self._attention):
            self._attention = done.attention
            self.say(f"attention of the recorded layers: {done.attention}")
        rewards, seconds, metrics = done.rewards, done.seconds, done.metrics
        groups = rewards.reshape(-1, self.state.config.rollout.samples)
        compared = {} if done.without_spread is None else {"reward/groups_without_spread": done.without_spread}
        entry = {
            "iteration": self.state.iteration,
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/group_std": float(groups.std(axis=1).mean()),
            **compared,
            **{f"train/{name}": value for name, value in metrics.items()},
            **{f"seconds/{name}": value for name, value in seconds.items()},
            "seconds/reward_hidden_fraction": seconds["reward_hidden"] / max(seconds["reward"], 1e-9),
        }
        self._record(entry)
        self._bar.update(1)
        self.say(
            f"iter {self.state.iteration:>4} | reward {entry['reward/mean']:.3f} ± {entry['reward/std']:.3f} | "
            f"{_update(done.without_spread, metrics)} | "
            f"rollout {seconds['rollout']:.1f} s, reward {seconds['reward']:.1f} s, update {seconds['update']:.1f} s"
        )

    def finish(self, held_out: HeldOut) -> dict[str, object]:
        """Write the summary, print the comparison with the base model, and return the summary."""
        base, latest, state = held_out.base, held_out.latest, self.state
        assert base is not None and latest is not None, "both were evaluated"
        compared = held_out.comparison()
        before = {name: float(base.scores[name][: len(latest)].mean()) for name in held_out.names}
        summary: dict[str, object] = {
            "method": state.config.method,
            "seed": state.config.run.seed,
            "iterations": state.iteration,
            "stopped": state.stopped,
            "held_out_prompts": len(latest),
            "held_out_distinct_prompts": len({prompt.text for prompt in held_out.prompts[: len(latest)]}),
            "seconds": round(state.seconds(), 1),
            "base": before,
            "final": latest.means(),
            "difference": {name: vars(difference) for name, difference in compared.items()},
        }
        if self._main:
            write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2).encode())
        self.say("")
        for name, difference in compared.items():
            self.say(_comparison(name, before[name], latest.means()[name], difference))
        report = "report.html, " if (self.folder / "report.html").is_file() else ""
        self.say(f"{report}pictures, metrics and the adapter are in {self.folder}")
        return summary


class _Warnings(logging.Handler):
    """Shows what the trainer warns of above the progress bar; any process but the main one says which it is."""

    def __init__(self, process: int) -> None:
        super().__init__(logging.WARNING)
        self.prefix = f"process {process}: " if process else ""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(f"{self.prefix}{record.getMessage()}")


def _scores(held_out: HeldOut, evaluation: Evaluation) -> str:
    means = evaluation.means()
    return ", ".join(f"{name} {means[name]:.4f}" for name in held_out.names)


def _update(without_spread: float | None, metrics: dict[str, float]) -> str:
    """What the update of an iteration measured, or why there was none."""
    spread = "" if without_spread is None else f"no spread {without_spread:4.0%} | "
    if without_spread == 1.0:
        return f"{spread}no group with spread: nothing to learn from, weights unchanged"
    if "gradient_norm" not in metrics:
        return f"{spread}every update skipped, weights unchanged"
    if "distance" in metrics:
        return f"distance {metrics['distance']:.2e} | grad {metrics['gradient_norm']:.2e}"
    kl = f"kl {metrics['kl']:.2e} | " if "kl" in metrics else ""
    return f"{spread}clip {metrics['clip_fraction']:6.2%} | {kl}grad {metrics['gradient_norm']:.2e}"


def _comparison(name: str, before: float, after: float, difference: PairedDifference) -> str:
    return (
        f"held-out {name:<7} before {before:.4f}  after {after:.4f}  difference {difference.mean:+.4f}, "
        f"95 % interval [{difference.low:+.4f}, {difference.high:+.4f}], p = {difference.p_value:.1e}: "
        f"{difference.verdict}"
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.key`, with values that trackers take."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
