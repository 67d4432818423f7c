"""STAR in Flow-Factory: an adapter that records maps while it samples, and a trainer whose loss reads them.

    accelerate launch examples/flow_factory/star.py examples/flow_factory/sd3_5.yaml

Written against Flow-Factory at commit a0b2bc5. Its trainer_type also chooses the class of the settings, so that the
file says ``grpo``, and the last lines put the trainer in its place.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from star_trainer.prompts.units.rules import units_by_rule

import star_kernels as sk

try:
    from flow_factory.hparams import Arguments
    from flow_factory.models.stable_diffusion.sd3_5 import SD3_5Adapter
    from flow_factory.samples import BaseSample
    from flow_factory.trainers import load_trainer
    from flow_factory.trainers.grpo import GRPOTrainer
    from flow_factory.utils.base import filter_kwargs
except ImportError as error:
    sys.exit(f"this example needs Flow-Factory (git clone https://github.com/X-GenGroup/Flow-Factory): {error}")

SAMPLERS = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance_sde", "CPS": "cps"}


def coefficients(scheduler: Any, t: torch.Tensor, t_next: torch.Tensor, noise_level: float) -> Any:
    """The numbers of one step, deterministic where the scheduler adds no noise."""
    levels = t.reshape(-1)[:1] / 1000, t_next.reshape(-1)[:1] / 1000
    kind = SAMPLERS[scheduler.dynamics_type] if noise_level and not scheduler.is_eval else "ode"
    return sk.transition_coefficients(kind, *levels, eta=float(noise_level), sigma_max=scheduler.sigmas[1])


class StarSD3Adapter(SD3_5Adapter):
    """Stable Diffusion 3 and 3.5 with `star_map` and `star_log_prob` in each sample, one a step."""

    recorder: sk.AttentionRecorder | None = None

    @functools.wraps(SD3_5Adapter.inference)
    def inference(self, prompt: list[str], extra_call_back_kwargs: Any = (), **options: Any) -> list[Any]:
        units = sk.TextUnits.from_pipeline(self.pipeline, prompt, [units_by_rule(text) for text in prompt])
        names = [*extra_call_back_kwargs, "star_map", "star_log_prob"]
        # With guidance the prompts' rows are the second half.
        with sk.record_attention(self.transformer, units, rows=slice(-len(prompt), None)) as self.recorder:
            samples = super().inference(prompt=prompt, extra_call_back_kwargs=names, **options)
        self.recorder = None
        return samples

    @functools.wraps(SD3_5Adapter.forward)
    def forward(self, *, t: torch.Tensor, latents: torch.Tensor, return_kwargs: Any, **options: Any) -> Any:
        known = [name for name in return_kwargs if not name.startswith("star_")]
        output = super().forward(t=t, latents=latents, return_kwargs=known, **options)
        if self.recorder is not None:
            patch, (height, width) = self.pipeline.transformer.config.patch_size, latents.shape[-2:]
            output.star_map = sk.allocation_map(self.recorder.mass, (height // patch, width // patch))
            self.recorder.discard_step()
            row = coefficients(self.scheduler, t, options["t_next"], options["noise_level"])
            drawn = self.cast_latents(output.next_latents, default_dtype=latents.dtype).float()  # as kept
            found = (output.noise_pred.float(), latents.float(), drawn, row)
            output.star_log_prob = sk.transition_log_prob(*found) if row.stochastic else torch.zeros_like(drawn[:, 0])
        return output


class StarTrainer(GRPOTrainer):
    """GRPO with an image's ratio that the map weighs; its settings keep their meaning."""

    def optimize(self, samples: list[Any]) -> None:
        args, adapter, accelerator = self.training_args, self.adapter, self.accelerator
        if self.enable_kl_loss and args.kl_type != "v-based":
            raise ValueError(f"train.kl_type: expected v-based, got {args.kl_type}")
        adapter.train()
        metrics, orders = [], [torch.randperm(len(samples)) for _ in range(args.num_inner_epochs)]
        for chosen in (part for order in orders for part in order.split(args.per_device_batch_size)):
            batch = BaseSample.stack([samples[i].to(accelerator.device) for i in chosen.tolist()])
            for step in adapter.scheduler.train_timesteps.tolist():
                with accelerator.accumulate(*adapter.trainable_components), self.autocast():
                    metrics.append(self.train_step(batch, step))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(adapter.get_trainable_parameters(), args.max_grad_norm)
                        self.optimizer.step()
                        self.optimizer.zero_grad()
                        means = {f"train/{k}": torch.stack([m[k] for m in metrics]).mean() for k in metrics[0]}
                        self.log_data(accelerator.reduce(means, "mean"), step=self.step)
                        self.step, metrics = self.step + 1, []

    def train_step(self, batch: dict[str, Any], step: int) -> dict[str, torch.Tensor]:
        args, place = self.training_args, batch["callback_index_map"][0][step]
        x, next_x = (batch["all_latents"][:, batch["latent_index_map"][i]] for i in (step, step + 1))
        times = torch.cat([batch["timesteps"], torch.zeros_like(batch["timesteps"][:, :1])], 1)
        inputs = {**args, **batch, "t": times[:, step], "t_next": times[:, step + 1], "latents": x}
        inputs |= {"next_latents": next_x, "return_kwargs": ["noise_pred"], "compute_log_prob": False}
        inputs, reference = filter_kwargs(self.adapter.forward, **inputs), None
        with sk.record_attention(self.adapter.transformer, None):  # the rollout's attention, to the bit
            if self.enable_kl_loss:
                with torch.no_grad(), self.adapter.use_ref_parameters():
                    reference = self.adapter.forward(**inputs).noise_pred.float()
            velocity = self.adapter.forward(**inputs).noise_pred.float()
        row = coefficients(self.adapter.scheduler, inputs["t"], inputs["t_next"], self.adapter.scheduler.noise_level)
        old, weights = (batch[name][:, place].to(velocity) for name in ("star_log_prob", "star_map"))
        advantage = batch["advantage"].clamp(*args.adv_clip_range).to(velocity)
        result = sk.policy_loss(
            velocity, x.float(), next_x.float(), old, advantage, row, weights=weights,
            granularity="image", clip_range=tuple(abs(bound) for bound in args.clip_range),
            reference_velocity=reference, kl_weight=args.kl_beta, kl_scale="velocity",
        )  # fmt: skip
        self.accelerator.backward(result.loss)
        return {name: result.metrics[name] for name in ("policy_loss", "kl", "clip_fraction", "ratio_mean")}


if __name__ == "__main__":
    config = Arguments.load_from_yaml(sys.argv[1])
    config.training_args.trainer_type = "star.StarTrainer"
    load_trainer(config).start()
