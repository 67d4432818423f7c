"""What passes between host and device does not grow with the steps: the meta device stands for a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from star_trainer.algorithms import policy_gradient
from star_trainer.algorithms.advantages import Advantages
from star_trainer.algorithms.policy_gradient import update
from star_trainer.algorithms.rollout import Rollout
from star_trainer.config import load_config
from star_trainer.families.policy import Policy
from star_trainer.run.randomness import stream
from star_trainer.sampling import Trajectory, denoise, text_units
from star_trainer.studies.cost.cases import Case, shape_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import star_kernels as sk

SMALL = ["train.batch_size=3", "train.kl_weight=0.01", "train.updates=1", "train.step_fraction=1"]
SMALL += ["rollout.prompts=2", "rollout.samples=3", "rollout.sde_steps=null", "backend=reference"]


class Transfers(TorchDispatchMode):
    """Counts tensors that are copied between the meta device and the CPU, and numbers that are read from it.

    What is read is made up: noise levels that fall, and zeros, of which a bool says that all is well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.is_meta for tensor in tensors)
        on_host = any(not tensor.is_meta and tensor.dim() > 0 for tensor in tensors)
        target = (kwargs or {}).get("device")
        if func is torch.ops.aten._local_scalar_dense.default and on_device:
            self.count += 1
            return args[0].dtype == torch.bool
        if func is torch.ops.aten._to_copy.default and target is not None:
            self.count += torch.device(target).type != tensors[0].device.type
            if on_device and torch.device(target).type == "cpu":
                read = torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
                return torch.linspace(1, 0, len(read)) if read.dim() == 1 else read
        elif on_device and on_host:
            # PyTorch sends indices by itself, and waits for them.
            self.count += 1
            args, kwargs = tree_map(_to_meta, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _to_meta(value: object) -> object:
    return value.to("meta") if isinstance(value, Tensor) and value.dim() > 0 else value


def case_of(steps: int, *settings: str) -> Case:
    return shape_case(load_config("tiny", [*SMALL, f"rollout.steps={steps}", *settings]))


def transfers_of_a_rollout(steps: int, guidance_scale: float) -> int:
    case = case_of(steps)
    policy, prompts = case.state.policy, case.prompts
    conditioning, units = policy.encode([prompt.text for prompt in prompts]), text_units(policy, prompts)
    with Transfers() as transfers:
        trajectory = denoise(
            policy,
            conditioning,
            steps=steps,
            kind="flow_sde",
            generator=[stream(0, "test", place) for place in range(len(prompts))],
            eta=0.7,
            guidance_scale=guidance_scale,
            units=units,
            allocation=case.state.config.allocation,
            backend="reference",
        )
    assert trajectory.latents.is_meta and trajectory.latents.shape[0] == steps + 1
    return transfers.count


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_a_rollout_sends_and_reads_as_much_whatever_its_steps(guidance_scale: float) -> None:
    counts = [transfers_of_a_rollout(steps, guidance_scale) for steps in (2, 5)]
    # Levels, coefficients, noise, units and whether the end is finite; and what guidance has for the empty prompt.
    assert counts[0] == counts[1] <= 7


def transfers_of_an_update(steps: int, *settings: str) -> int:
    case = case_of(steps, *settings)
    state, policy = case.state, case.state.policy
    AcceleratorState._reset_state(reset_partial_state=True)
    state.accelerator = Accelerator(cpu=True)
    parameters = list(policy.trainable().values())
    state.optimizer, state.average = torch.optim.AdamW(parameters), EMAModel(parameters, decay=0.9)
    kept_on = torch.device("cpu" if state.config.rollout.keep_on_host else "meta")

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, device=kept_on)

    (channels, height, width), samples = policy.latent_shape, 6
    row = sk.transition_coefficients("flow_sde", torch.tensor([0.8]), torch.tensor([0.7])).to("meta")
    trajectory = Trajectory(
        empty(steps + 1, samples, channels, height, width),
        empty(steps, samples, height, width),
        empty(steps, samples, *policy.grid),
        [row] * steps,
        empty(steps, samples, channels, height, width) if state.config.needs_old_velocity else None,
    )
    conditioning = policy.encode([prompt.text for prompt in case.prompts])
    timesteps, places = torch.empty(steps, device="meta"), np.arange(samples)
    rollout = Rollout(trajectory, timesteps, conditioning, np.zeros(samples), case.prompts, places, 3, {})
    with Transfers() as transfers:
        update(state, rollout, Advantages(np.ones(samples), np.ones(samples, bool), 0.0), 0)
    return transfers.count


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        # Two batches of samples: their rows, advantages and prompts; and what is read in the end.
        ([], 9),
        (["rollout.guidance_scale=4.5", "train.old_log_prob=recompute"], 25),
        (["rollout.keep_on_host=true"], 13),
        (["train.objective=guard", "allocation.temporal=velocity", "rollout.keep_on_host=true"], 16),
    ],
)
def test_an_update_sends_and_reads_as_much_whatever_its_passes(
    settings: list[str], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = policy_gradient.summarise

    def healthy(*arguments: Any, **options: Any) -> dict[str, float]:
        # What is read is made up, and would pass for a loss that is not finite.
        return dict.fromkeys(real(*arguments, **options), 0.0)

    monkeypatch.setattr(policy_gradient, "summarise", healthy)
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    counts = [transfers_of_an_update(steps, *settings) for steps in (2, 4)]
    assert counts[0] == counts[1] <= most


def test_the_reference_is_the_policy_without_its_adapters_and_trains_on_after_it() -> None:
    policy: Policy = case_of(2).state.policy
    trained = set(policy.trainable())
    layers = policy._adapted_layers
    assert layers and not any(layer.disable_adapters for layer in layers)
    with policy.without_adapters():
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers) and set(policy.trainable()) == trained
