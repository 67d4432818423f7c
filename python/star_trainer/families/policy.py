"""The model that is post-trained: a diffusers pipeline, its adapters, and the calls that the trainer makes of it."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from star_trainer.config import Config, ConfigError, Lora, Model
from star_trainer.config.paths import TINY_PIPELINE

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Embeddings:
    """What the transformer sees of B prompts: text tokens [B, N_text, D] and a pooled vector [B, P]."""

    text: Tensor
    pooled: Tensor

    def __getitem__(self, rows: Any) -> Embeddings:
        return Embeddings(self.text[rows], self.pooled[rows])

    def repeat_interleave(self, repeats: int) -> Embeddings:
        return Embeddings(self.text.repeat_interleave(repeats, 0), self.pooled.repeat_interleave(repeats, 0))

    def expand(self, batch: int) -> Embeddings:
        return Embeddings(self.text.expand(batch, -1, -1), self.pooled.expand(batch, -1))


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
    _cache: OrderedDict[str, tuple[Tensor, Tensor]] = field(default_factory=OrderedDict)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def model(self) -> Any:
        """The transformer without what distributed training wraps it in."""
        return getattr(self.transformer, "module", self.transformer)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        size = self.model.config.sample_size
        if self.config.resolution is not None:
            size = self.config.resolution // self.pipeline.vae_scale_factor
        return self.model.config.in_channels, size, size

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens per column and row."""
        _, height, width = self.latent_shape
        return height // self.model.config.patch_size, width // self.model.config.patch_size

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        """Noise levels [steps + 1] and timesteps [steps] of `model.levels`, as the pipeline's scheduler sets them."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        options: dict[str, Any] = {"num_inference_steps": steps}
        if self.config.levels == "even":
            options = {"sigmas": np.linspace(1.0, 1.0 / steps, steps)}
        if scheduler.config.get("use_dynamic_shifting"):
            from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

            names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
            options["mu"] = calculate_shift(self.grid[0] * self.grid[1], *(scheduler.config[name] for name in names))
        scheduler.set_timesteps(device=self.device, **options)
        return scheduler.sigmas.to(self.device), scheduler.timesteps.to(self.device)

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Text embeddings. Each text is encoded by itself and kept, so that a result depends on nothing else."""
        self.encode_ahead(texts)
        entries = [self._cache[text] for text in texts]
        device = self.device
        return Embeddings(
            torch.stack([entry[0] for entry in entries]).to(device),
            torch.stack([entry[1] for entry in entries]).to(device),
        )

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
        encoders = [getattr(self.pipeline, name) for name in TEXT_ENCODERS]
        try:
            for encoder in encoders:
                if encoder is not None:
                    encoder.to(self.device)
            for text in missing:
                hidden, _, pooled, _ = self.pipeline.encode_prompt(
                    text,
                    None,
                    None,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.config.max_sequence_length,
                )
                self._cache[text] = (hidden[0].cpu(), pooled[0].cpu())
        finally:
            for encoder in encoders:
                if encoder is not None:
                    encoder.to("cpu")
        size = hidden.nbytes + pooled.nbytes
        while len(self._cache) > max(int(self.config.embedding_cache * 2**30) // size, len(texts)):
            self._cache.popitem(last=False)

    def velocity(self, latents: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """The transformer's prediction [B, C, H, W] for latents at one timestep (0-d tensor)."""
        # Without gradients there is nothing that the wrapper of several processes would have to do.
        transformer = self.transformer if torch.is_grad_enabled() else self.model
        with torch.autocast(latents.device.type, torch.bfloat16) if self.autocast else nullcontext():
            velocity: Tensor = transformer(
                hidden_states=latents,
                timestep=timestep.expand(len(latents)),
                encoder_hidden_states=embeddings.text,
                pooled_projections=embeddings.pooled,
                return_dict=False,
            )[0]
        return velocity.float() if self.autocast else velocity

    @torch.no_grad()
    def reference_velocity(self, latents: Tensor, timestep: Tensor, embeddings: Embeddings) -> Tensor:
        """The prediction of the model that training started from."""
        if self.frozen_copy is not None:
            frozen = Policy(self.pipeline, self.frozen_copy, self.config)
            return frozen.velocity(latents, timestep, embeddings)
        with self.without_adapters():
            return self.velocity(latents, timestep, embeddings)

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """Within this context the policy has the weights that training started from.

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
                "run.folder: the base model's evaluation is gone, and full training keeps no base weights"
            )

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        self.model.disable_adapters()
        try:
            yield
        finally:
            self.model.enable_adapters()

    def pixels(self, latents: Tensor, decoder: Any = None) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of latents [B, C, H, W], differentiably, by the pipeline's or another decoder.

        Another decoder, such as diffusers' AutoencoderTiny, must belong to the same latents.
        """
        vae = self.pipeline.vae if decoder is None else decoder
        return (vae.decode(self._unscaled(latents, vae), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    @staticmethod
    def _unscaled(latents: Tensor, vae: Any) -> Tensor:
        """Latents as the autoencoder makes them."""
        return latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Images [B, H, W, 3] uint8 of latents [B, C, H, W]."""
        vae = self.pipeline.vae
        scaled = self._unscaled(latents, vae)
        # A convolution over many images at once is slower on a CPU than over a few.
        images = [vae.decode(chunk, return_dict=False)[0] for chunk in scaled.split(16)]
        pixels = self.pipeline.image_processor.postprocess(torch.cat(images).float(), output_type="np")
        return np.ascontiguousarray(np.round(pixels * 255.0).astype(np.uint8))


def add_adapter(transformer: Any, config: Lora) -> None:
    """Add low-rank adapters to a transformer.

    Raises:
        ConfigError: targets that match no layer.
    """
    from peft import LoraConfig

    adapter = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets), init_lora_weights="gaussian"
    )
    try:
        transformer.add_adapter(adapter)
    except ValueError as error:
        raise ConfigError(f"model.lora.targets: {error}") from error


def check_against_model(config: Config, transformer: Any, vae_scale: int) -> None:
    """What of a configuration only the transformer (its configuration is enough) and the autoencoder's scale can tell.

    Raises:
        ConfigError: a resolution, a layer or a clip range that does not suit them.
    """
    shape = transformer.config
    resolution = config.model.resolution
    token = vae_scale * shape.patch_size
    largest = token * shape.pos_embed_max_size
    if resolution is not None and (resolution % token or resolution > largest):
        raise ConfigError(f"model.resolution: expected a multiple of {token} up to {largest}, got {resolution}")
    blocks = shape.num_layers
    if config.allocation.layers is not None and max(config.allocation.layers) >= blocks:
        raise ConfigError(f"allocation.layers: expected indices below {blocks}, got {config.allocation.layers}")
    side = shape.sample_size if resolution is None else resolution // vae_scale
    per_position = config.granularity == "position" and not config.trains_by_reward_gradient
    if per_position and config.train.clip_range * side >= 1.0:
        raise ConfigError(
            f"train.clip_range: expected below 1/sqrt(H*W) = {1.0 / side:.4g} where ratios are per position, "
            f"got {config.train.clip_range}"
        )


def load_pipeline(config: Model) -> Any:
    """Load the pipeline with frozen weights.

    Raises:
        ConfigError: it cannot be loaded, is not Stable Diffusion 3, or lacks some of its weights.
    """
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

    source = str(TINY_PIPELINE) if config.pipeline == "tiny" else config.pipeline
    dtype = getattr(torch, config.dtype)
    try:
        with warnings.catch_warnings():
            # The name of this argument changed between the diffusers releases that are supported.
            warnings.simplefilter("ignore", FutureWarning)
            options = {"torch_dtype": dtype, "use_safetensors": True}
            parts = {}
            # The pipeline itself would only warn of missing weights, and go on with random ones.
            for part, kind in (("transformer", SD3Transformer2DModel), ("vae", AutoencoderKL)):
                parts[part], found = kind.from_pretrained(source, subfolder=part, output_loading_info=True, **options)
                if found["missing_keys"]:
                    missing = sorted(found["missing_keys"])
                    raise ValueError(f"its {part} has no weights for {missing[0]} and {len(missing) - 1} others")
            pipeline = StableDiffusion3Pipeline.from_pretrained(source, **parts, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pipeline: {config.pipeline!r} cannot be loaded: {error}") from error
    freeze(pipeline)
    return pipeline


def freeze(pipeline: Any) -> None:
    """Ready a pipeline for sampling: no gradients, no dropout, no progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    for part in ("vae", *TEXT_ENCODERS, "transformer"):
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
        ConfigError: a pipeline that cannot be loaded or is not Stable Diffusion 3, or adapter targets
            that match no layer.
    """
    pipeline = load_pipeline(config) if pipeline is None else pipeline
    transformer = pipeline.transformer
    frozen_copy = None
    if config.lora is None:
        frozen_copy = copy.deepcopy(transformer) if keep_reference else None
        transformer.requires_grad_(True)
    else:
        add_adapter(transformer, config.lora)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return Policy(pipeline, transformer, config, frozen_copy)
