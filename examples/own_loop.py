"""STAR in a training loop of your own, whole and short: sample, reward, update.

    python examples/own_loop.py --iterations 20

trains an adapter on the small Stable Diffusion 3 pipeline of the package, on a CPU. What you would put in its place
is your pipeline, your prompts and your reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from star_trainer.config.paths import TINY_PIPELINE
from star_trainer.prompts.units.rules import units_by_rule

import star_kernels as sk

PROMPTS = ["a photo of a red circle above a green square", "a photo of a red cross left of a blue circle"]
GROUP = 8  # samples of a prompt, which are compared with each other
STEPS = 4


def reward(images: torch.Tensor) -> torch.Tensor:
    """How red the reddest pixels are: images [B, 3, H, W] in [0, 1] to [B]. Yours may be anything with numbers."""
    redness = images[:, 0] - images[:, 1:].amax(1)
    return redness.flatten(1).topk(600).values.mean(1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(TINY_PIPELINE), help="a Stable Diffusion 3 pipeline")
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's sides")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--out", help="a folder for the adapter, which pipe.load_lora_weights reads")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    pipe = StableDiffusion3Pipeline.from_pretrained(options.pipeline, torch_dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    model = pipe.transformer.requires_grad_(False)
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    # A prompt's samples stand next to each other. The phrases that the reward depends on are found by rule.
    prompts = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    units = sk.TextUnits.from_pipeline(pipe, PROMPTS, [units_by_rule(prompt) for prompt in PROMPTS])
    units = units.repeat_interleave(GROUP)
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)

    pipe.scheduler.set_timesteps(STEPS, device=model.device)
    timesteps, sigmas = pipe.scheduler.timesteps, pipe.scheduler.sigmas
    coefficients = [
        sk.transition_coefficients("flow_sde", sigma, following, eta=0.7, sigma_max=sigmas[1])
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True)
    ]
    channels, side = model.config.in_channels, options.size // pipe.vae_scale_factor
    grid = (side // model.config.patch_size,) * 2

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return model(x, text, pooled, t.expand(len(x)), return_dict=False)[0]

    for iteration in range(options.iterations):
        # Sample, and keep of each step what the update needs, with the map of where the units were looked for.
        x, steps = torch.randn(len(prompts), channels, side, side, device=model.device), []
        with torch.no_grad(), sk.record_attention(model, units) as recorder:
            for t, row in zip(timesteps, coefficients, strict=True):
                step = sk.transition_step(velocity(x, t), x, row, noise=torch.randn_like(x))
                steps.append((t, row, x, step.next_sample, step.log_prob, sk.allocation_map(recorder.mass, grid)))
                recorder.discard_step()
                x = step.next_sample
            latents = x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
            images = pipe.vae.decode(latents, return_dict=False)[0].div(2).add(0.5).clamp(0, 1)

        # An image's advantage: how much better it is than the others of its prompt.
        rewards = reward(images).view(-1, GROUP)
        advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)).flatten()

        # Update. The map says where in the latent an advantage acts; its mean is 1.
        for t, row, x, next_x, log_prob, weights in steps:
            loss = sk.policy_loss(
                velocity(x, t), x, next_x, log_prob, advantage, row, weights=weights, granularity="image"
            ).loss
            (loss / len(steps)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"iteration {iteration + 1}: reward {float(rewards.mean()):.4f}")

    if options.out:
        from peft import get_peft_model_state_dict

        StableDiffusion3Pipeline.save_lora_weights(options.out, get_peft_model_state_dict(model))


if __name__ == "__main__":
    main()
