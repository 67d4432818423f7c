"""STAR in a loop of Flow-GRPO's shape, and what to change in its `scripts/train_sd3.py`.

    python examples/flow_grpo.py --iterations 10

The loop below is ours, on the small pipeline of the package, with the parts and the names of that script. A comment
"train_sd3.py:" says what stands there in the line's place; everything else of the script can stay.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from star_trainer.config.paths import TINY_PIPELINE
from star_trainer.prompts.units.rules import units_by_rule

import star_kernels as sk

PROMPTS = ["a photo of two red circles", "a photo of a red square above a blue cross"]
# sample.num_image_per_prompt, num_steps, guidance_scale (24, 10, 4.5 there) and noise_level of config/grpo.py
IMAGES_PER_PROMPT, NUM_STEPS, GUIDANCE, NOISE_LEVEL = 4, 4, 2.0, 0.7
# train.clip_range, adv_clip_max, beta and batch_size
CLIP_RANGE, ADV_CLIP_MAX, BETA, BATCH_SIZE = 1e-4, 5.0, 0.004, 4


def reward_fn(images: torch.Tensor) -> torch.Tensor:
    """How red the reddest pixels are, from images [B, 3, H, W] in [0, 1]."""
    return (images[:, 0] - images[:, 1:].amax(1)).flatten(1).topk(600).values.mean(1)


def predict(model: torch.nn.Module, sample: dict[str, torch.Tensor], latents: torch.Tensor, t: torch.Tensor) -> tuple:
    """The predictions without and with the prompt, as the script's `compute_log_prob` makes them."""
    v = model(
        hidden_states=torch.cat([latents] * 2),
        timestep=t.expand(2 * len(latents)),
        encoder_hidden_states=torch.cat([sample["neg_embeds"], sample["embeds"]]),
        pooled_projections=torch.cat([sample["neg_pooled"], sample["pooled"]]),
        return_dict=False,
    )[0]
    return v.chunk(2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=10)
    iterations = parser.parse_args().iterations
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY_PIPELINE, torch_dtype=torch.float32)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    model, device = pipe.transformer.requires_grad_(False), pipe.device
    model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    side = model.config.sample_size

    # Once, beside the prompts' embeddings. train_sd3.py: nothing; with its max_sequence_length=128 pass the same here.
    prompts = [prompt for prompt in PROMPTS for _ in range(IMAGES_PER_PROMPT)]
    units = sk.TextUnits.from_pipeline(pipe, prompts, [units_by_rule(prompt) for prompt in prompts])
    with torch.no_grad():
        embeds, neg_embeds, pooled, neg_pooled = pipe.encode_prompt(prompts, None, None)
    pipe.scheduler.set_timesteps(NUM_STEPS, device=device)
    sigmas = pipe.scheduler.sigmas
    # One row of numbers a step, for sampling and for the update. train_sd3.py: inside sde_step_with_logprob.
    rows = [
        sk.transition_coefficients("flow_sde", sigma, following, eta=NOISE_LEVEL, sigma_max=sigmas[1])
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True)
    ]
    steps = list(zip(pipe.scheduler.timesteps, rows, strict=True))

    for iteration in range(iterations):
        # Sampling. train_sd3.py: pipeline_with_logprob, whose loop gets the `with` and the lines of the recorder.
        sample = {"embeds": embeds, "neg_embeds": neg_embeds, "pooled": pooled, "neg_pooled": neg_pooled}
        latents = [torch.randn(len(prompts), model.config.in_channels, side, side, device=device)]
        log_probs, maps = [], []
        # The prompts' rows come behind those of the empty one.
        with torch.no_grad(), sk.record_attention(model, units, rows=slice(len(prompts), None)) as recorder:
            for t, row in steps:
                empty, v = predict(model, sample, latents[-1], t)
                noise, guided = torch.randn_like(v), {"unconditional_velocity": empty, "guidance_scale": GUIDANCE}
                step = sk.transition_step(v, latents[-1], row, noise=noise, **guided)
                maps.append(sk.allocation_map(recorder.mass, (side // model.config.patch_size,) * 2))
                recorder.discard_step()
                latents.append(step.next_sample)
                log_probs.append(step.log_prob)
            decoded = pipe.vae.decode(latents[-1] / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)
        # `log_probs` is [B, T, H, W] here, [B, T] there; `maps`, [B, T, h, w], is one more entry of the samples.
        sample |= {name: torch.stack(v, 1) for name, v in (("log_probs", log_probs), ("maps", maps), ("x", latents))}

        # Advantages, as the script's PerPromptStatTracker with sample.global_std: nothing changes.
        rewards = reward_fn(decoded.sample.div(2).add(0.5).clamp(0, 1)).view(-1, IMAGES_PER_PROMPT)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std() + 1e-4)).flatten()
        sample["advantages"] = advantages.clamp(-ADV_CLIP_MAX, ADV_CLIP_MAX)

        # Training, in shuffled batches, step by step.
        for chosen in torch.randperm(len(prompts), device=device).split(BATCH_SIZE):
            part = {name: value[chosen] for name, value in sample.items()}
            for j, (t, row) in enumerate(steps):
                x, next_x = part["x"][:, j], part["x"][:, j + 1]
                model.disable_adapters()
                with torch.no_grad():
                    reference = torch.lerp(*predict(model, part, x, t), GUIDANCE)
                model.enable_adapters()
                empty, v = predict(model, part, x, t)
                # train_sd3.py: sde_step_with_logprob, ratio, both losses, kl_loss, approx_kl and clipfrac.
                result = sk.policy_loss(
                    v, x, next_x, part["log_probs"][:, j], part["advantages"], row, weights=part["maps"][:, j],
                    granularity="image", clip_range=CLIP_RANGE,
                    reference_velocity=reference, kl_weight=BETA, kl_scale="std_dev",
                    unconditional_velocity=empty.detach(), guidance_scale=GUIDANCE,
                )  # fmt: skip
                (result.loss / NUM_STEPS).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        print(f"iteration {iteration + 1}: reward {float(rewards.mean()):.4f}, KL {float(result.metrics['kl']):.2e}")


if __name__ == "__main__":
    main()
