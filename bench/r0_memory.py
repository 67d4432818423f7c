"""Peak memory of R0's backward pass by the number of steps: `python -m bench.r0_memory` (docs/r0.md has its table)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from star_trainer.algorithms import r0
from star_trainer.config import load_config
from star_trainer.run.state import build_state
from star_trainer.worlds.scenes.captions import sample_prompts
from torch import Tensor

from bench.harness import clock_for, default_device

STEPS = (1, 2, 4, 8)
IMAGES = 12


def redness(images: Tensor, texts: Sequence[str]) -> Tensor:
    """A reward that needs no memory of its own."""
    return (images[:, 0] - images[:, 1]).mean((1, 2))


def main() -> None:
    torch.set_num_threads(1)
    settings = [f"train.batch_size={IMAGES}", "r0.decode_batch_size=2"]
    state = build_state(load_config("tiny_r0", settings))
    prompts = sample_prompts(np.random.default_rng(0), IMAGES, held_out=False)
    supervision = r0.Supervision({"redness": redness}, {"redness": 1.0})
    clock = clock_for(default_device())
    print("| steps | " + " | ".join(map(str, STEPS)) + " |\n" + "|---" * (len(STEPS) + 1) + "|")
    for name, checkpointing in (("each step run again", "true"), ("all activations kept", "false")):
        cells = []
        for steps in STEPS:
            overrides = [*settings, f"rollout.steps={steps}", f"r0.checkpointing={checkpointing}"]
            state.config = load_config("tiny_r0", overrides)
            peak = clock.peak_bytes(
                lambda: r0.backward(state, supervision, prompts, range(IMAGES), iteration=0, scale=1.0)
            )
            cells.append(f"{peak / 1e6:.1f} MB")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
