"""Compare a sharded transformer in bfloat16 with one in one piece: several processes call `main` with a folder."""

from __future__ import annotations

import sys

import torch
from star_trainer.config import load_config
from star_trainer.families.policy import load_policy
from star_trainer.run.processes import is_distributed_tensor, is_sharded
from star_trainer.run.state import build_state


def main() -> None:
    overrides = [f"run.folder={sys.argv[1]}", "model.dtype=bfloat16", "rollout.prompts=2"]
    config = load_config("tiny", [*overrides, "model.sharded=true"])
    policy = build_state(config).policy
    assert is_sharded(policy.model)
    torch.manual_seed(config.run.seed)
    whole = load_policy(config.model)
    whole.autocast = True
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    embeddings = whole.encode(["a red circle", "a blue square"])
    # bfloat16 knows 752 and 756.
    timestep = torch.tensor(753.9)
    expected, found = (each.velocity(latents, timestep, embeddings) for each in (whole, policy))
    rounded = whole.velocity(latents, timestep.bfloat16().float(), embeddings)
    found.square().mean().backward()
    gradients = [parameter.grad for parameter in policy.trainable().values() if parameter.grad is not None]
    assert gradients and all(is_distributed_tensor(each) and each.dtype == torch.float32 for each in gradients)
    differences = [float((each - expected).detach().abs().max()) for each in (found, rounded)]
    print(f"difference {differences[0]} by rounding {differences[1]}")
    torch.distributed.destroy_process_group()
