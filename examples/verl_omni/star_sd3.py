"""STAR in verl-omni, for Stable Diffusion 3 and 3.5: an adapter that records maps, and a loss that reads them.

    PYTHONPATH=.../examples/verl_omni bash examples/flowgrpo_trainer/sd35/run_sd35_medium_ocr_lora.sh \\
        actor_rollout_ref.model.external_lib=star_sd3

in a checkout of verl-omni: its workers import this file, and their ``flow_grpo`` is then STAR (``loss_mode`` takes no
new names). vLLM-Omni samples, and is not recorded. The maps are from the trainer's own pass for the old log-probs,
which hands a tensor [B, steps, ...] of any shape on, and they travel in it. What compares these log-probs with the
rollout's has to stay off, as it is by default: ``algorithm.rollout_correction`` and ``rollout.calculate_log_probs``.
``actor.strategy`` has to be fsdp2, without sequence parallelism. ``clip_ratio`` is an image's, as before.

Written against commit a1139ba. Adapter, engine and loss of verl-omni were run with it on a CPU, on the small pipeline,
all weights and fsdp2 with LoRA in one process, with vLLM-Omni's modules replaced by empty ones. Not run: a whole
training with Ray and vLLM-Omni, a GPU, several processes, published weights.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from star_trainer.prompts.units.rules import units_by_rule

import star_kernels as sk

try:
    from verl.utils import tensordict_utils
    from verl_omni.pipelines.model_base import DiffusionModelBase
    from verl_omni.pipelines.sd3_flow_grpo import StableDiffusion3FlowGRPO
    from verl_omni.trainer.diffusion.diffusion_algos import FlowGRPOLoss, register_diffusion_loss
except ImportError as error:
    raise ImportError(f"this example needs verl-omni (https://github.com/verl-project/verl-omni): {error}") from error


def find_units(tokenizers: dict[str, Any], chats: list[Any], length: int) -> sk.TextUnits:
    """The units of chats with the prompt as their text, on an axis of `length` tokens: CLIP's, and then T5's."""
    given = [(tokenizers or {}).get(name, {}) for name in ("clip", "t5")]
    lengths = [each.get("max_length") or 0 for each in given]
    if sum(lengths) != length or 0 in lengths:
        raise ValueError(
            "actor_rollout_ref.model.extra_tokenizers: expected clip and t5, with a max_length each that add up to the "
            f"{length} tokens of the prompt's embeddings, got {lengths}"
        )
    prompts = ["".join(turn["content"] for turn in chat if turn["role"] == "user") for chat in chats]
    found = [units_by_rule(prompt) for prompt in prompts]
    return sk.TextUnits.from_prompts(
        prompts, found, tokenizers=[each["tokenizer"] for each in given], max_lengths=lengths
    )


@DiffusionModelBase.register("StableDiffusion3Pipeline", algorithm="flow_grpo")
class StarStableDiffusion3(StableDiffusion3FlowGRPO):
    """Log-probs of positions, [B, H, W]; without gradient with the step's map beside them, [B, 2, H, W]."""

    @classmethod
    def forward_and_sample_previous_step(
        cls,
        module: Any,
        scheduler: Any,
        model_config: Any,
        model_inputs: dict[str, torch.Tensor],
        negative_model_inputs: dict[str, torch.Tensor] | None,
        scheduler_inputs: Any,
        step: int,
    ) -> tuple[torch.Tensor, ...]:
        inputs = (model_inputs, negative_model_inputs, scheduler_inputs, step)
        units = None
        if not torch.is_grad_enabled():
            chats = tensordict_utils.get(scheduler_inputs, "raw_prompt")
            length = model_inputs["encoder_hidden_states"].shape[1]
            units = find_units(model_config.extra_tokenizer_map, chats, length)
        # With guidance the prompt's pass comes first. Without units the attention is the recorded one's, to the bit.
        with sk.record_attention(module, units, record_pass=0) as recorder:
            _, mean, std, sqrt_dt = super().forward_and_sample_previous_step(module, scheduler, model_config, *inputs)
        drawn = scheduler_inputs["all_latents"][:, step + 1].float()
        # Flow-GRPO's sampler gives the noise's rate, the others give its scale.
        spread = std * sqrt_dt.view(-1, 1, 1, 1) if model_config.algo.sde_type == "sde" else std
        log_prob = torch.distributions.Normal(mean, spread).log_prob(drawn).mean(1)
        if units is not None:
            patch, (height, width) = module.config.patch_size, drawn.shape[-2:]
            weights = sk.allocation_map(recorder.mass, (height // patch, width // patch))
            weights = weights.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
            log_prob = torch.stack([log_prob, weights], 1)
        return log_prob, mean, std, sqrt_dt


@register_diffusion_loss("flow_grpo")
class StarLoss(FlowGRPOLoss):
    """Flow-GRPO's loss with a ratio at each position, a clip range that fits, and the map as the loss's weights."""

    @classmethod
    def compute_loss(
        cls,
        *,
        old_log_prob: torch.Tensor,
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        config: Any,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        if old_log_prob.dim() != 4:
            raise ValueError("rollout_correction.bypass_mode: expected False, for the rollout's log-probs have no maps")
        old, weights = old_log_prob.unbind(1)
        given = config.diffusion_loss
        clip = sk.position_clip_range(given.clip_ratio, *old.shape[-2:])
        config = SimpleNamespace(diffusion_loss=SimpleNamespace(clip_ratio=clip, adv_clip_max=given.adv_clip_max))
        advantages = advantages.view(-1, 1, 1)
        rows = {"old_log_prob": old, "log_prob": log_prob, "advantages": advantages, "rollout_is_weights": weights}
        return super().compute_loss(config=config, **rows)
