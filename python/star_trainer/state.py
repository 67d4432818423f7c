"""Everything that a training run carries from one iteration to the next, and how it is saved and restored."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from star_trainer import checkpoint
from star_trainer.config import Config, ConfigError
from star_trainer.policy import Policy, check_against_model, load_policy


@dataclass
class TrainingState:
    """The policy, its optimiser and moving average, and how far training has come."""

    config: Config
    accelerator: Accelerator
    policy: Policy
    optimizer: Any
    average: EMAModel
    iteration: int = 0
    skipped_in_a_row: int = 0
    seconds_before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, those before it was stopped and resumed included."""
        return self.seconds_before + time.monotonic() - self.started

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within this context the policy has the moving average of its weights: what is evaluated and exported."""
        parameters = list(self.policy.trainable().values())
        self.average.store(parameters)
        self.average.copy_to(parameters)
        try:
            yield
        finally:
            self.average.restore(parameters)

    def save(self, root: Path) -> None:
        """Write a checkpoint of this state, whole or not at all; every process must call it."""
        rank, main = self.accelerator.process_index, self.accelerator.is_main_process
        partial = checkpoint.begin(root, self.iteration) if main else checkpoint.partial_folder(root, self.iteration)
        self.accelerator.wait_for_everyone()
        rng_tensors, rng_values = checkpoint.rng_state()
        checkpoint.add(partial, f"rng_{rank:04d}", rng_tensors)
        optimizer_tensors, optimizer_values = checkpoint.optimizer_state(self.optimizer)
        if main:
            parameters = self.policy.trainable()
            checkpoint.add(partial, "policy", parameters)
            checkpoint.add(partial, "average", dict(zip(parameters, self.average.shadow_params, strict=True)))
            checkpoint.add(partial, "optimizer", optimizer_tensors)
        self.accelerator.wait_for_everyone()
        if main:
            values = {
                "config": self.config.model_dump(mode="json"),
                "optimizer": optimizer_values,
                "rng": rng_values,
                "average_steps": self.average.optimization_step,
                "skipped_in_a_row": self.skipped_in_a_row,
                "seconds": self.seconds(),
            }
            checkpoint.commit(partial, values, keep=self.config.checkpoints.keep)
        self.accelerator.wait_for_everyone()

    def restore(self, root: Path) -> bool:
        """Take up the newest whole checkpoint under `root`; False if there is none.

        Raises:
            CheckpointError: checkpoints exist but none is whole, or the newest belongs to other settings.
        """
        found = checkpoint.load_latest(root)
        if found is None:
            return False
        _check_same_settings(found.values["config"], self.config.model_dump(mode="json"), root)
        parameters = self.policy.trainable()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(found.tensors["policy"][name])
            for name, shadow in zip(parameters, self.average.shadow_params, strict=True):
                shadow.copy_(found.tensors["average"][name])
        self.average.optimization_step = found.values["average_steps"]
        checkpoint.load_optimizer_state(self.optimizer, found.tensors["optimizer"], found.values["optimizer"])
        # With fewer or more processes than before, a process without a state of its own keeps the one it started with.
        own = found.tensors.get(f"rng_{self.accelerator.process_index:04d}")
        if own is not None:
            checkpoint.set_rng_state(own, found.values["rng"])
        self.iteration = found.iteration
        self.seconds_before = found.values["seconds"]
        self.skipped_in_a_row = found.values["skipped_in_a_row"]
        return True


# Settings that may change between a run and its resumption: they do not touch what is computed.
_FREE_KEYS = (
    "run.",
    "checkpoints.",
    "reward.remote.",
    "units.cache",
    "units.endpoint",
    "units.key_variable",
    "units.timeout",
)


def _check_same_settings(saved: dict[str, Any], current: dict[str, Any], root: Path) -> None:
    def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}.{key}".strip(".")).items()}

    old, new = flatten(saved), flatten(current)
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    # More iterations of the same training is what resuming is for.
    changed = [key for key in keys if not key.startswith(_FREE_KEYS) or key == "run.seed"]
    changed = [key for key in changed if key != "train.iterations"]
    if changed:
        shown = ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed[:4])
        raise checkpoint.CheckpointError(
            f"{root}: the checkpoint belongs to other settings ({shown}); choose another run.folder or run.resume=false"
        )


def build_state(config: Config) -> TrainingState:
    """Load the model and set up what trains it; deterministic in `run.seed`."""
    tracker = "tensorboard"
    accelerator = Accelerator(
        mixed_precision="no" if config.model.dtype == "float32" else "bf16",
        log_with=tracker,
        project_dir=config.run.folder,
        cpu=not torch.cuda.is_available(),
    )
    if accelerator.num_processes > 1:
        # Groups without spread are dropped per process, which would leave processes with unequal numbers of passes.
        raise ConfigError(f"training runs in one process so far, and {accelerator.num_processes} were launched")
    torch.manual_seed(config.run.seed)
    policy = load_policy(config.model, keep_reference=config.train.kl_weight > 0.0)
    check_against_model(config, policy.model, policy.pipeline.vae_scale_factor)
    policy.pipeline.to(accelerator.device)
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.train.learning_rate, weight_decay=config.train.weight_decay, betas=(0.9, 0.99)
    )
    policy.transformer, optimizer = accelerator.prepare(policy.transformer, optimizer)
    if policy.frozen_copy is not None:
        policy.frozen_copy = accelerator.prepare_model(policy.frozen_copy.to(accelerator.device), evaluation_mode=True)
    average = EMAModel(list(policy.trainable().values()), decay=config.train.ema_decay)
    return TrainingState(config, accelerator, policy, optimizer, average)
