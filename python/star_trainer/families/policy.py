"""The model that is post-trained: a diffusers pipeline, its adapters, and the calls that the trainer makes of it."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import star_kernels as sk
from star_kernels.policy_loss.clip_range import position_factor
from star_trainer.config import Config, ConfigError, Model
from star_trainer.config.paths import folder_or_name
from star_trainer.families import family_named, family_of, pipeline_source
from star_trainer.families.adapters import add_saved_adapter, read_adapter
from star_trainer.families.conditioning import Conditioning, Guidance, Prediction
from star_trainer.families.family import Family
from star_trainer.families.loading import load_whole


@dataclass
class Policy:
    """A pipeline with the transformer that is trained; `transformer` may be wrapped for distributed training."""

    pipeline: Any
    transformer: Any
    config: Model
    frozen_copy: Any = None
    # Where accelerate does not wrap the transformer's forward pass in it.
    autocast: bool = False
    # In host memory: a few megabytes per prompt at full size, and prompts come in the thousands.
    _cache: OrderedDict[str, Conditioning] = field(default_factory=OrderedDict)

    @cached_property
    def family(self) -> Family:
        """What depends on the kind of pipeline."""
        return family_of(self.pipeline)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def model(self) -> Any:
        """The transformer without what distributed training wraps it in."""
        return getattr(self.transformer, "module", self.transformer)

    @property
    def vae_scale(self) -> int:
        """Pixels of a latent position's side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        return self.family.latent_shape(self.config, self.model.config, self.vae_scale)

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens per column and row."""
        return self.family.grid(self.config, self.model.config, self.vae_scale)

    @property
    def num_layers(self) -> int:
        """Blocks whose attention can be recorded."""
        return self.family.num_layers(self.model.config)

    def check(self, config: Config) -> None:
        """Refuse settings that do not suit the model.

        Raises:
            ConfigError: as of `check_against_model`.
        """
        check_against_model(config, self.family, self.model.config, self.vae_scale)
        check_layers(config, self.model)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        """Noise levels [steps + 1] and timesteps [steps] of `model.levels`, as the pipeline's scheduler sets them."""
        return self.family.schedule(self.pipeline, self.config, steps, self.grid, self.device)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Each text's conditioning, encoded by itself and kept, so that a result depends on nothing else."""
        self.encode_ahead(texts)
        return Conditioning.joined([self._cache[text] for text in texts]).to(self.device)

    @torch.no_grad()
    def encode_ahead(self, texts: Sequence[str]) -> None:
        """Encode what is not known yet; the text encoders are on the device for that long and no longer.

        The texts asked for longest ago are forgotten where the cache would grow beyond ``model.embedding_cache``.
        """
        texts = list(dict.fromkeys(texts))
        for text in texts:
            if text in self._cache:
                self._cache.move_to_end(text)
        missing = [text for text in texts if text not in self._cache]
        if not missing:
            return
        encoders = [getattr(self.pipeline, name) for name in self.family.encoder_parts]
        try:
            for encoder in encoders:
                if encoder is not None:
                    encoder.to(self.device)
            for text in missing:
                self._cache[text] = self.family.encode(self.pipeline, self.config, text, self.device).to("cpu")
        finally:
            for encoder in encoders:
                if encoder is not None:
                    encoder.to("cpu")
        size = self._cache[missing[-1]].nbytes
        while len(self._cache) > max(int(self.config.embedding_cache * 2**30) // size, len(texts)):
            self._cache.popitem(last=False)

    def text_units(self, texts: Sequence[str], units: Sequence[Sequence[str]]) -> sk.TextUnits:
        """The units of prompts on the model's text tokens."""
        return self.family.text_units(self.pipeline, self.config, texts, units).to(self.device)

    def guidance(self, batch: int, scale: float) -> Guidance | None:
        """Guidance of `batch` samples; None where the scale is 1, at which it does nothing."""
        if scale <= 1.0:
            return None
        empty = self.encode([""]).repeat(batch) if self.takes_two_predictions(scale) else None
        return Guidance(scale, empty)

    def takes_two_predictions(self, scale: float) -> bool:
        """Whether guidance of that scale asks the model once more, for the empty prompt."""
        return scale > 1.0 and self.family.guidance_kind(self.model.config) == "two_predictions"

    def velocity(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """One call of the transformer: its prediction [B, C, H, W] at one timestep (0-d tensor, or [B])."""
        # Without gradients there is nothing that the wrapper of several processes would have to do.
        transformer = self.transformer if torch.is_grad_enabled() else self.model
        with torch.autocast(latents.device.type, torch.bfloat16) if self.autocast else nullcontext():
            velocity = self.family.velocity(transformer, latents, timestep, conditioning)
        return velocity.float() if self.autocast else velocity

    def predict(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance | None = None
    ) -> Prediction:
        """The prediction for latents [B, C, H, W], under guidance with the one without a prompt."""
        return self.family.predict(self.velocity, latents, timestep, conditioning, guidance)

    @torch.no_grad()
    def reference_velocity(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """`velocity` of the model that training started from."""
        if self.frozen_copy is not None:
            frozen = Policy(self.pipeline, self.frozen_copy, self.config)
            return frozen.velocity(latents, timestep, conditioning)
        with self.without_adapters():
            return self.velocity(latents, timestep, conditioning)

    def predict_reference(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance | None = None
    ) -> Prediction:
        """`predict` of the model that training started from."""
        return self.family.predict(self.reference_velocity, latents, timestep, conditioning, guidance)

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """Within this context the policy has the pipeline's own weights: those that training started from, but for
        an adapter that it may have started from.

        Raises:
            ConfigError: all weights are trained and no copy of the first ones is kept.
        """
        if self.config.lora is not None:
            with self.without_adapters():
                yield
        elif self.frozen_copy is not None:
            trained, self.transformer = self.transformer, self.frozen_copy
            try:
                yield
            finally:
                self.transformer = trained
        else:
            raise ConfigError(
                "run.folder: the base model's evaluation is gone or was of other held-out prompts or settings, and "
                "full training keeps no base weights"
            )

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Within this context, which is for passes without gradients, the transformer runs without its adapters."""
        # The layers' flag alone: PEFT's own switch walks all modules and also turns gradients off and on.
        for layer in self._adapted_layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self._adapted_layers:
                layer._disable_adapters = False

    @cached_property
    def _adapted_layers(self) -> list[Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def pixels(self, latents: Tensor, decoder: Any = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of latents [B, C, H, W], differentiably, by the pipeline's or another decoder.

        Another decoder, such as diffusers' AutoencoderTiny, must belong to the same latents.
        """
        return self.family.pixels(self.pipeline, latents, decoder)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Images [B, H, W, 3] uint8 of latents [B, C, H, W]."""
        # A convolution over many images at once is slower on a CPU than over a few.
        pixels = torch.cat([self.pixels(chunk) for chunk in latents.split(16)])
        images = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return np.ascontiguousarray(np.round(images * 255.0).astype(np.uint8))


def lora_targets(config: Model, family: Family) -> list[str]:
    """The layers that get an adapter: those that are named, or the family's."""
    assert config.lora is not None, "there are adapters"
    return list(family.lora_targets if config.lora.targets is None else config.lora.targets)


def add_adapter(transformer: Any, config: Model, family: Family) -> None:
    """Add low-rank adapters to a transformer: new ones, or those that `model.adapter` names.

    Raises:
        ConfigError: targets that match no layer, or an adapter that does not fit.
    """
    from peft import LoraConfig

    assert config.lora is not None, "there are adapters"
    if config.adapter is not None:
        add_saved_adapter(transformer, read_adapter(config.adapter, family, "model.adapter"))
        return
    adapter = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules=lora_targets(config, family),
        init_lora_weights="gaussian",
    )
    try:
        transformer.add_adapter(adapter)
    except ValueError as error:
        raise ConfigError(f"model.lora.targets: {error}") from error


def set_trainable(transformer: Any, config: Model, family: Family) -> None:
    """Let a frozen transformer's new adapters, or all of its weights, require gradients, wherever there will be one.

    DistributedDataParallel waits for the gradient of every parameter that requires one.

    Raises:
        ConfigError: as of `add_adapter`.
    """
    if config.lora is None:
        transformer.requires_grad_(True)
    else:
        add_adapter(transformer, config, family)
    for module in family.unread(transformer):
        module.requires_grad_(False)


def check_against_model(config: Config, family: Family, shape: Any, vae_scale: int) -> None:
    """What of a configuration only the transformer's configuration and the autoencoder's scale can tell.

    Raises:
        ConfigError: a resolution, a layer, a guidance scale, a sampler or a clip range that does not suit them.
    """
    family.check(config.model, shape, vae_scale)
    for key, scale in (("rollout", config.rollout.guidance_scale), ("evaluation", config.evaluation.guidance_scale)):
        if scale > 1.0 and family.guidance_kind(shape) is None:
            raise ConfigError(f"{key}.guidance_scale: expected 1 for a model without guidance, got {scale}")
    samplers = family.noising.samplers
    if not config.trains_by_reward_gradient and config.rollout.sampler not in samplers:
        raise ConfigError(
            f"rollout.sampler: expected {' or '.join(samplers)} for a {family.pipeline_class}, "
            f"got {config.rollout.sampler}"
        )
    blocks = family.num_layers(shape)
    if any(isinstance(layer, int) and layer >= blocks for layer in config.allocation.layers or ()):
        raise ConfigError(f"allocation.layers: expected indices below {blocks}, got {config.allocation.layers}")
    _, height, width = family.latent_shape(config.model, shape, vae_scale)
    # A position's range is so many times the image's, and a step's at most so many times their mean.
    factor = position_factor(height, width) if config.train.granularity == "position" else 1.0
    factor *= config.rollout.noisy_steps if config.train.clip_range_by_step == "spread" else 1
    if not config.trains_by_reward_gradient and config.train.clip_range * factor >= 1.0:
        raise ConfigError(
            f"train.clip_range: expected below {1.0 / factor:.4g}, which is 1/sqrt(H*W) where ratios are per position, "
            f"over the number of steps where ranges are spread over them, got {config.train.clip_range}"
        )


def check_layers(config: Config, model: Any) -> None:
    """Refuse names of layers that a transformer, which may be on the meta device, does not have.

    Raises:
        ConfigError: with one that it has.
    """
    if not any(isinstance(layer, str) for layer in config.allocation.layers or ()):
        return
    try:
        with sk.record_attention(model, None, layers=config.allocation.layers):
            pass
    except ValueError as error:
        raise ConfigError(f"allocation.{error}") from error


def load_pipeline(config: Model) -> Any:
    """Load the pipeline with frozen weights.

    Raises:
        ConfigError: it cannot be loaded, is of no family that is known, or lacks some of its weights.
    """
    family = family_named(config.pipeline)
    try:
        with warnings.catch_warnings():
            # The name of an argument changed between the diffusers releases that are supported.
            warnings.simplefilter("ignore", FutureWarning)
            dtypes = (getattr(torch, name) for name in (config.dtype, config.dtype_of_vae))
            pipeline = family.load(pipeline_source(config.pipeline), *dtypes)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pipeline: {config.pipeline!r} cannot be loaded: {error}") from error
    freeze(pipeline)
    return pipeline


def freeze(pipeline: Any) -> None:
    """Ready a pipeline for sampling: no gradients, no dropout, no progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    family = family_of(pipeline)
    for part in ("vae", *family.encoder_parts, family.model_part):
        module = getattr(pipeline, part)
        if module is not None:
            module.requires_grad_(False)
            module.eval()


def load_policy(config: Model, *, keep_reference: bool = False, pipeline: Any = None) -> Policy:
    """Load the pipeline and add what is trained: adapters, or all weights of the transformer.

    Args:
        config: the model section.
        keep_reference: keep a frozen copy of the weights where there are no adapters to switch off.
        pipeline: what takes the place of the one that `config` names, its weights frozen.

    Raises:
        ConfigError: a pipeline that cannot be loaded or is of no known family, or adapter targets that match no
            layer.
    """
    pipeline = load_pipeline(config) if pipeline is None else pipeline
    family = family_of(pipeline)
    transformer = getattr(pipeline, family.model_part)
    frozen_copy = copy.deepcopy(transformer) if config.lora is None and keep_reference else None
    set_trainable(transformer, config, family)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return Policy(pipeline, transformer, config, frozen_copy)


def load_small_decoder(name: str, policy: Policy) -> Any:
    """diffusers' AutoencoderTiny, which decodes in the place of the pipeline's autoencoder where gradients are wanted.

    Raises:
        ConfigError: it cannot be loaded whole, or is for other latents.
    """
    from diffusers import AutoencoderTiny

    try:
        source = folder_or_name(name, "r0.small_decoder")
        decoder = load_whole(AutoencoderTiny, source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"r0.small_decoder: {name!r} cannot be loaded: {error}") from error
    channels = policy.latent_shape[0]
    if decoder.config.latent_channels != channels:
        raise ConfigError(
            f"r0.small_decoder: expected a decoder of latents with {channels} channels, "
            f"got one of {decoder.config.latent_channels}"
        )
    return decoder.requires_grad_(False).eval().to(policy.device)
