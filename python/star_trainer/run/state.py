"""Everything that a training run carries from one iteration to the next, and how it is saved and restored."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)
from diffusers.training_utils import EMAModel
from filelock import FileLock
from pydantic import ValidationError
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from star_trainer.config import Config, ConfigError, with_implied
from star_trainer.families.policy import Policy, load_policy, lora_targets
from star_trainer.run import checkpoint
from star_trainer.run.inputs import prompt_digests
from star_trainer.run.processes import distribute_like, fail_together, full_tensor, is_distributed_tensor
from star_trainer.run.randomness import stream

# Seconds that processes wait for each other beyond the longest that a reward may take: models load and download.
_PATIENCE = 900.0


@dataclass
class TrainingState:
    """The policy, its optimiser and moving average, and how far training has come."""

    config: Config
    accelerator: Accelerator
    policy: Policy
    optimizer: Any
    average: EMAModel
    # Digests of the files that training reads, by setting.
    files: dict[str, str] = field(default_factory=dict)
    iteration: int = 0
    # The last one that has a checkpoint.
    saved_iteration: int = 0
    # Whether the run that is resumed had the same settings of evaluation.
    evaluates_as_before: bool = True
    skipped_in_a_row: int = 0
    # Whether this start has compared its training passes with the rollout.
    agreement_checked: bool = False
    # Why the run ended before its last iteration.
    stopped: str | None = None
    seconds_before: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, those before it was stopped and resumed included."""
        return self.seconds_before + time.monotonic() - self.started

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within this context the policy has the moving average of its weights: what is evaluated and exported."""
        parameters = list(self.policy.trainable().values())
        trained = [parameter.detach().clone() for parameter in parameters]
        _copy(self.average.shadow_params, parameters)
        try:
            yield
        finally:
            _copy(trained, parameters)

    def save(self, root: Path) -> None:
        """Write a checkpoint of this state, whole or not at all; every process must call it.

        Raises:
            OSError: writing failed in this process.
            CheckpointError: it failed in another one.
        """
        self._save(root, self.accelerator.is_main_process, partial(fail_together, self.accelerator, stoppable=False))

    def save_alone(self, root: Path) -> bool:
        """`save` without the other processes, which may be gone; False where this one cannot.

        That is where the weights are spread over all of them. What another process has saved of this iteration stays.
        """
        if self.config.model.sharded:
            return False
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".saving"):
            if self.iteration not in checkpoint.iterations(root):
                self._save(root, True, lambda action, *failures: action())
        return True

    def _save(self, root: Path, writes: bool, agreed: Callable[..., None]) -> None:
        """Write what is this process's, and, if it `writes`, what all have; each step ends when it is `agreed`."""
        failures = (checkpoint.CheckpointError, OSError)
        folder = checkpoint.partial_folder(root, self.iteration)
        agreed(lambda: checkpoint.begin(root, self.iteration) if writes else None, *failures)
        rng_tensors, rng_values = checkpoint.rng_state()
        rank = self.accelerator.process_index
        agreed(lambda: checkpoint.add(folder, f"rng_{rank:04d}", rng_tensors), *failures)
        optimizer_tensors, optimizer_values = checkpoint.optimizer_state(self.optimizer)
        parameters = self.policy.trainable()
        averages = dict(zip(parameters, self.average.shadow_params, strict=True))
        for name, tensors in (("policy", parameters), ("average", averages), ("optimizer", optimizer_tensors)):
            # All processes take part in putting a tensor together; one writes it.
            complete: dict[str, torch.Tensor] = {}
            for key, tensor in tensors.items():
                value = full_tensor(tensor.detach())
                if writes:
                    complete[key] = value.cpu() if is_distributed_tensor(tensor) else value
            agreed(partial(checkpoint.add, folder, name, complete) if writes else lambda: None, *failures)
        values = {
            "config": self.config.model_dump(mode="json"),
            "files": self.files,
            "optimizer": optimizer_values,
            "rng": rng_values,
            "average_steps": self.average.optimization_step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "stopped": self.stopped,
            "seconds": self.seconds(),
        }
        keep = self.config.checkpoints.keep
        agreed(lambda: checkpoint.commit(folder, values, keep=keep) if writes else None, *failures)
        self.saved_iteration = self.iteration

    def restore(self, root: Path) -> bool:
        """Take up the newest whole checkpoint under `root`; False if there is none.

        Raises:
            CheckpointError: checkpoints exist but none is whole, or the newest belongs to other settings.
        """
        found = checkpoint.load_latest(root)
        if found is None:
            return False
        self.evaluates_as_before = _check_same_settings(found.values, self, root)
        parameters = self.policy.trainable()
        _copy([found.tensors["policy"][name] for name in parameters], list(parameters.values()))
        _copy([found.tensors["average"][name] for name in parameters], self.average.shadow_params)
        self.average.optimization_step = found.values["average_steps"]
        checkpoint.load_optimizer_state(
            self.optimizer, found.tensors["optimizer"], found.values["optimizer"], place=_as_parameter
        )
        # With fewer or more processes than before, a process without a state of its own keeps the one it started with.
        own = found.tensors.get(f"rng_{self.accelerator.process_index:04d}")
        if own is not None:
            checkpoint.set_rng_state(own, found.values["rng"])
        self.iteration = self.saved_iteration = found.iteration
        self.seconds_before = found.values["seconds"]
        self.skipped_in_a_row = found.values["skipped_in_a_row"]
        limits = {key: found.values["config"].get("r0", {}).get(key) for key in ("stop_distance", "stop_drop")}
        # With other limits it may go on.
        if all(getattr(self.config.r0, key) == limit for key, limit in limits.items()):
            self.stopped = found.values.get("stopped")
        return True

    def take_average(self, root: Path) -> bool:
        """Take the averaged weights of the newest whole checkpoint, whatever else it was trained with; False if none.

        Raises:
            CheckpointError: checkpoints exist but none is whole, or its weights are not those of this model.
        """
        found = checkpoint.load_latest(root)
        if found is None:
            return False
        averages, parameters = found.tensors["average"], self.policy.trainable()
        if {name: t.shape for name, t in averages.items()} != {name: p.shape for name, p in parameters.items()}:
            raise checkpoint.CheckpointError(f"{found.path}: its weights are not those that these settings train")
        _copy([averages[name] for name in parameters], list(parameters.values()))
        self.iteration = found.iteration
        return True


# Settings that may change between a run and its resumption: they change what is learnt by rounding at most.
_FREE_KEYS = (
    "backend",
    "run.",
    "model.gradient_checkpointing",
    "model.sharded",
    "model.embedding_cache",
    "prompts.held_out",
    "prompts.origin",
    "units.cache",
    "units.endpoint",
    "units.key_variable",
    "units.timeout",
    "rollout.batch_size",
    "rollout.keep_on_host",
    "rollout.encode_ahead",
    "reward.remote.",
    *(f"reward.judge.{name}" for name in ("at_once", "cache", "endpoint", "key_variable", "retries", "timeout")),
    "reward.timeout",
    "train.batch_size",
    "train.max_skipped_updates",
    "r0.checkpointing",
    "r0.decode_batch_size",
    "r0.stop_",
    "evaluation.",
    "checkpoints.",
)
# Those of them that a held-out score depends on.
_EVALUATION_KEYS = (
    "prompts.held_out",
    *(f"evaluation.{name}" for name in ("prompts", "steps", "guidance_scale", "group")),
)


def _check_same_settings(values: dict[str, Any], state: TrainingState, root: Path) -> bool:
    """Whether held-out scores of then are comparable with those of now, as far as settings tell.

    Raises:
        CheckpointError: a setting, or the content of the file of prompts, that decides what is learnt has changed.
    """
    config, family = state.config, state.policy.family

    def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for key, value in tree.items() for k, v in flatten(value, f"{prefix}.{key}".strip(".")).items()}

    def settled(config: Config) -> dict[str, Any]:
        """The settings, with what null stands for where runs of before have said it."""
        flat = flatten(config.model_dump(mode="json"))
        if config.model.lora is not None:
            flat["model.lora.targets"] = lora_targets(config.model, family)
        return flat

    saved = with_implied(values["config"])
    try:
        old = settled(Config.model_validate(saved))
    except ValidationError:
        old = flatten(saved)
    new = settled(config)
    # What is in the file counts, not where it is; checkpoints of before do not say what was in it.
    for key, digest in values.get("files", {}).items():
        if key in state.files and digest == state.files[key]:
            old[key] = new[key]
        elif key in state.files:
            old[key] = f"{old[key]} with the sha256 {digest}"
            new[key] = f"{new[key]} with the sha256 {state.files[key]}"
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    # More iterations of the same training is what resuming is for.
    changed = [key for key in keys if not key.startswith(_FREE_KEYS) or key == "run.seed"]
    changed = [key for key in changed if key != "train.iterations"]
    if changed:
        shown = ", ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in changed)
        raise checkpoint.CheckpointError(
            f"{root}: the checkpoint belongs to other settings, which decide what is learnt ({shown}); "
            "choose another run.folder or run.resume=false"
        )
    return not set(keys) & set(_EVALUATION_KEYS)


def _as_parameter(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What an optimiser keeps of a parameter, spread over the processes as that is."""
    return distribute_like(value, parameter) if value.shape == parameter.shape else value


def _copy(values: Sequence[torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for value, parameter in zip(values, parameters, strict=True):
            parameter.copy_(value if is_distributed_tensor(value) else distribute_like(value, parameter))


def build_state(config: Config, pipeline: Any = None) -> TrainingState:
    """Load the model, or take `pipeline` for it, and set up what trains it; deterministic in `run.seed`.

    Raises:
        ConfigError: weights to be spread over a single process, or a model that cannot be loaded.
    """
    accelerator = Accelerator(
        mixed_precision="no" if config.model.dtype == "float32" else "bf16",
        log_with=list(config.run.trackers),
        project_dir=config.run.folder,
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[
            # Every process has the same buffers: sending them about would only make evaluations wait for each other.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.reward.timeout + _PATIENCE)),
        ],
    )
    torch.backends.cuda.matmul.allow_tf32 = config.model.tf32
    processes = accelerator.num_processes
    if config.model.sharded and processes == 1:
        raise ConfigError("model.sharded: expected several processes to spread the weights over, got one")
    torch.manual_seed(config.run.seed)
    policy = load_policy(config.model, keep_reference=config.needs_first_weights, pipeline=pipeline)
    policy.check(config)
    policy.pipeline.vae.to(accelerator.device)
    policy.transformer.to(accelerator.device)
    if config.model.sharded:
        _shard(policy)
        policy.autocast = config.model.dtype == "bfloat16"
    else:
        policy.transformer = accelerator.prepare_model(policy.transformer)
    optimizer = accelerator.prepare_optimizer(
        torch.optim.AdamW(
            list(policy.trainable().values()),
            lr=config.train.learning_rate,
            weight_decay=config.train.weight_decay,
            betas=config.train.betas,
        )
    )
    if policy.frozen_copy is not None:
        policy.frozen_copy = accelerator.prepare_model(policy.frozen_copy.to(accelerator.device), evaluation_mode=True)
    average = EMAModel(list(policy.trainable().values()), decay=config.train.ema_decay)
    if processes > 1:
        # What has no stream of its own, such as a reward's own draws, must not be the same in every process.
        torch.manual_seed(stream(config.run.seed, "process", accelerator.process_index).initial_seed())
    return TrainingState(config, accelerator, policy, optimizer, average, prompt_digests(config.prompts))


def _shard(policy: Policy) -> None:
    """Spread the weights over all processes, block by block, in place.

    Not through accelerate, whose FSDP is for GPUs alone. Precision is autocast's, as it is for a transformer in one
    piece: a policy that casts what goes in would round timesteps to bfloat16, which knows every fourth of them.
    """
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    for module in (*policy.family.blocks(policy.transformer), policy.transformer):
        # Said explicitly: the outermost module would keep its weights whole after a pass without gradients.
        fully_shard(module, mp_policy=precision, reshard_after_forward=True)
