"""The runs of an ablation: one process each, several at a time, taken up again where they were stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from star_trainer.config import Config, ConfigError, load_config, with_implied
from star_trainer.rewards import RewardError, check_differentiable
from star_trainer.studies.arms import Arm

# Settings that every run has its own of.
_OWN_KEYS = ("run.seed", "run.folder", "run.resume")
# Every how many seconds the runs are looked after.
_POLL = 0.5


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    source: str
    overrides: tuple[str, ...]
    folder: Path

    def config(self) -> Config:
        """Its configuration.

        Raises:
            ConfigError: settings that cannot be used.
        """
        return load_config(self.source, self.overrides)

    def command(self) -> list[str]:
        return [sys.executable, "-m", "star_trainer", self.source, *self.overrides]

    def is_done(self) -> bool:
        """Whether the folder holds the summary of this very run."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            content = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            saved = Config.model_validate(with_implied(content))
        except (OSError, ValueError, AttributeError):
            return False
        config = self.config()
        same = saved.model_copy(update={"run": config.run, "checkpoints": config.checkpoints}) == config
        return same and (summary.get("iterations") == config.train.iterations or bool(summary.get("stopped")))

    def iterations_done(self) -> int:
        return sum("reward/mean" in record for record in read_metrics(self.folder))


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """What a run has logged so far; a line that is being written is left out."""
    records = []
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plan_runs(
    source: str, overrides: Sequence[str], arms: Sequence[Arm], seeds: Sequence[int], folder: Path
) -> list[Run]:
    """All runs, seed by seed, so that what is compared with each other is done at about the same time.

    Raises:
        ConfigError: settings of an arm that cannot be used, or that measure something else than the others do.
    """
    _refuse(("method", *_OWN_KEYS), overrides)
    for arm in arms:
        _check(source, overrides, arm)
    runs = []
    for seed in seeds:
        for arm in arms:
            place = folder / arm.name / f"seed_{seed}"
            own = (f"run.seed={seed}", f"run.folder={place}", "run.progress=false", "run.resume=true")
            runs.append(Run(arm.name, seed, source, (*overrides, *arm.overrides, *own), place))
    measured = {run: (config.reward, config.prompts) for run in runs for config in [run.config()]}
    for run, what in measured.items():
        if what != measured[runs[0]]:
            raise ConfigError(
                f"--arm: {run.arm} has another reward or other prompts than {runs[0].arm}: they cannot be compared"
            )
    return runs


def _refuse(keys: Sequence[str], overrides: Sequence[str]) -> None:
    for key in (override.partition("=")[0] for override in overrides):
        if key in keys:
            raise ConfigError(f"{key}: expected none, this follows from --methods, --arm, --seeds and --folder")


def _check(source: str, overrides: Sequence[str], arm: Arm) -> None:
    try:
        _refuse(_OWN_KEYS, arm.overrides)
        config = load_config(source, [*overrides, *arm.overrides])
        if config.trains_by_reward_gradient:
            check_differentiable(config.reward)
    except (ConfigError, RewardError) as error:
        raise ConfigError(f"{arm.name}: {error}") from error


def places(jobs: int | None) -> list[dict[str, str]]:
    """The environment of each run that goes on at the same time: a GPU each, or a share of the processor's cores.

    ``OMP_NUM_THREADS`` is left as it is where it is set.
    """
    cores = len(os.sched_getaffinity(0))
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = jobs or devices or cores
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // count)))}
    if not devices:
        return [threads] * count
    # Of the GPUs that this process may use, by the names that it knows them by.
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = [name.strip() for name in named if name.strip()] or [str(device) for device in range(devices)]
    return [{**threads, "CUDA_VISIBLE_DEVICES": names[place % len(names)]} for place in range(count)]


def run_all(runs: Sequence[Run], environments: Sequence[dict[str, str]]) -> dict[Run, str]:
    """Run what is not done yet, with a progress bar over all iterations, and return the failures' last words."""
    waiting = [run for run in runs if not run.is_done()]
    failures: dict[Run, str] = {}
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
    if not waiting:
        return failures
    total = sum(run.config().train.iterations for run in waiting)
    free = list(environments)
    active: dict[Run, tuple[subprocess.Popen[bytes], dict[str, str]]] = {}
    done = 0
    begun = sum(run.iterations_done() for run in waiting)
    with _ended(active), tqdm(total=total, initial=begun, unit="iter", smoothing=0.0, disable=None) as bar:
        while waiting or active:
            while waiting and free:
                run, environment = waiting.pop(0), free.pop(0)
                active[run] = (_start(run, environment), environment)
            time.sleep(_POLL)
            for run, (process, environment) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[run]
                free.append(environment)
                done += run.iterations_done()
                if process.returncode != 0 or not run.is_done():
                    failures[run] = _last_line(run.folder / "log.txt")
                    tqdm.write(f"{run.arm}, seed {run.seed} failed: {failures[run]}")
            bar.set_postfix_str(", ".join(f"{run.arm} {run.seed}" for run in active), refresh=False)
            bar.update(max(0, done + sum(run.iterations_done() for run in active) - bar.n))
    return failures


def _start(run: Run, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("ab") as log:
        return subprocess.Popen(run.command(), stdout=log, stderr=log, env={**os.environ, **environment})


@contextmanager
def _ended(active: dict[Run, tuple[subprocess.Popen[bytes], dict[str, str]]]) -> Iterator[None]:
    """Leave no process behind, however the context is left: an exception, Ctrl-C or a request to end (SIGTERM)."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for process, _ in active.values():
            process.terminate()
        for process, _ in active.values():
            process.wait()
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1] if lines else "it said nothing"
