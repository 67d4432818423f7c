"""The guide to STAR in another training loop: its code runs as it stands, and replaces what it says it replaces."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import star_kernels as sk

GUIDE = Path(__file__).parent.parent / "docs" / "integration.md"
GUIDANCE, GROUP = 2.0, 2


def code() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    return block


@pytest.fixture(scope="module")
def scope() -> dict[str, Any]:
    """What the guide asks for, and after it has run all that it has made."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig
    from star_trainer.config.paths import TINY_PIPELINE

    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY_PIPELINE, torch_dtype=torch.float32)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"]))
    prompts = [text for text in ("a photo of a red circle", "a photo of two blue squares") for _ in range(GROUP)]

    def encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            text, _, pooled, _ = pipe.encode_prompt(texts, None, None, do_classifier_free_guidance=False)
        return text, pooled

    text, pooled = encode(prompts)
    no_text, no_pooled = encode([""] * len(prompts))
    pipe.scheduler.set_timesteps(3)
    parameters = [parameter for parameter in pipe.transformer.parameters() if parameter.requires_grad]
    names: dict[str, Any] = {
        "pipe": pipe,
        "prompts": prompts,
        "phrases": [["red circle"]] * GROUP + [["two blue squares"]] * GROUP,
        **{"text": text, "pooled": pooled, "no_text": no_text, "no_pooled": no_pooled},
        "x": torch.randn(len(prompts), 4, 16, 16),
        "reward": lambda x: x.flatten(1).mean(1),
        **{"group": GROUP, "guidance": GUIDANCE, "optimizer": torch.optim.AdamW(parameters, lr=1e-3)},
        "before": [parameter.clone() for parameter in parameters],
        "after": parameters,
    }
    exec(code(), names)
    return names


def test_what_is_added_are_ten_lines() -> None:
    assert 0 < sum(line.endswith("# STAR") for line in code().splitlines()) <= 10


def test_it_samples_allocates_and_trains(scope: dict[str, Any]) -> None:
    assert len(scope["rollout"]) == 3 and not any(scope["units"].missing)
    for *_, log_prob, weights in scope["rollout"]:
        assert log_prob.shape == (4, 16, 16) and weights.shape == (4, 8, 8)
        torch.testing.assert_close(weights.mean((1, 2)), torch.ones(4), rtol=0, atol=1e-6)
        assert weights.std() > 0
    assert math.isfinite(scope["result"].loss.item())
    torch.testing.assert_close(scope["result"].metrics["ratio_mean"], torch.tensor(1.0), rtol=0, atol=1e-5)
    assert any(not torch.equal(old, new) for old, new in zip(scope["before"], scope["after"], strict=True))


def test_the_mean_log_prob_is_that_of_an_image(scope: dict[str, Any]) -> None:
    # The Gaussian of docs/method.md, section 2, written out, averaged over all elements of an image.
    sigmas, transformer = scope["sigmas"], scope["pipe"].transformer
    for index, (t, _, x, next_x, log_prob, _) in enumerate(scope["rollout"]):
        # The policy that sampled: its adapters began at zero.
        transformer.disable_adapters()
        with torch.no_grad():
            empty, v = scope["predict"](x, t)
        transformer.enable_adapters()
        velocity = empty + GUIDANCE * (v - empty)
        sigma, dt = sigmas[index], sigmas[index + 1] - sigmas[index]
        rate = 0.7 * torch.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma)))
        mean = x * (1 + rate**2 / (2 * sigma) * dt) + velocity * (1 + rate**2 * (1 - sigma) / (2 * sigma)) * dt
        normal = torch.distributions.Normal(mean, rate * torch.sqrt(-dt))
        torch.testing.assert_close(log_prob.mean((1, 2)), normal.log_prob(next_x).mean((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_without_maps_and_per_image_it_is_the_loss_of_the_other_loop(scope: dict[str, Any]) -> None:
    t, c, x, next_x, old, _ = scope["rollout"][1]
    with torch.no_grad():
        empty, v = scope["predict"](x, t)
    advantage, clip = scope["advantage"], 1e-4
    new = sk.transition_log_prob(v, x, next_x, c, unconditional_velocity=empty, guidance_scale=GUIDANCE)
    ratio = torch.exp(new.mean((1, 2)) - old.mean((1, 2)))
    # The policy has been updated, so that ratios are not 1 and some are clipped.
    assert (ratio - 1).abs().max() > 1e-4
    expected = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
    options = {"unconditional_velocity": empty, "guidance_scale": GUIDANCE}
    found = sk.policy_loss(v, x, next_x, old, advantage, c, clip_range=clip, granularity="image", **options)
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
