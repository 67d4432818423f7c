"""Train the tiny Stable Diffusion 3 pipeline from nothing: ``python build.py --out FOLDER`` in this folder.

Four steps, each with one seed: tokenizers for the words of the scenes world; an autoencoder; a flow-matching
transformer together with its text encoders; and the measurement of the base reward on held-out prompts. What
comes out is an ordinary diffusers folder with fp16 safetensors, the log of the run and a README that states
what was measured. About an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from star_trainer.prompts import Prompt
from star_trainer.worlds.requirements import judge
from star_trainer.worlds.scenes.captions import sample_prompts
from star_trainer.worlds.scenes.detector import detect
from star_trainer.worlds.scenes.renderer import IMAGE_SIZE, render, sample_scene
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

CLIP_LENGTH = 16
T5_LENGTH = 16
LATENT_CHANNELS = 4
CAPTION_DROPOUT = 0.1
GUIDANCE_SCALES = (1.0, 2.0)  # the first is what presets/tiny.yaml samples with


def clip_tokenizer(corpus: list[str]) -> CLIPTokenizer:
    """A byte-level BPE with CLIP's conventions whose merges cover `corpus`; any other text falls to bytes."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    learner.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer(corpus: list[str]) -> T5Tokenizer:
    """A unigram model with T5's conventions: whole words of `corpus`, single characters for any other text."""
    words = sorted({word for text in corpus for word in text.split()})
    characters = sorted({chr(code) for code in range(33, 127)})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -4.0) for word in words] + [(character, -8.0) for character in characters]
    pieces = list(dict(pieces).items())
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_LENGTH)


def build_modules(corpus: list[str]) -> dict[str, Any]:
    """The untrained parts of the pipeline, by the names that StableDiffusion3Pipeline gives them."""
    clip, t5 = clip_tokenizer(corpus), t5_tokenizer(corpus)

    def clip_text_encoder() -> CLIPTextModelWithProjection:
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=48,
                intermediate_size=192,
                projection_dim=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=CLIP_LENGTH,
                bos_token_id=clip.bos_token_id,
                eos_token_id=clip.eos_token_id,
                pad_token_id=clip.pad_token_id,
            )
        )

    text_encoder_3 = T5EncoderModel(
        T5Config(vocab_size=len(t5), d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4, dropout_rate=0.0)
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=128,
        pooled_projection_dim=96,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return {
        "tokenizer": clip,
        "tokenizer_2": clip_tokenizer(corpus),
        "tokenizer_3": t5,
        "text_encoder": clip_text_encoder(),
        "text_encoder_2": clip_text_encoder(),
        "text_encoder_3": text_encoder_3,
        "vae": vae,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.5),
    }


def make_scenes(count: int, rng: np.random.Generator) -> tuple[list[Prompt], torch.Tensor]:
    """Captioned training images of the split that is not held out: prompts, and [count, 3, 64, 64] uint8."""
    prompts = sample_prompts(rng, count, held_out=False)
    images = np.stack([render(sample_scene(prompt.metadata, rng), rng) for prompt in tqdm(prompts, desc="scenes")])
    return prompts, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _to_model_range(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1.0


def _cosine(step: int, steps: int, warmup: int = 100) -> float:
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))


class BuildLog:
    """Records of the run: kept, printed, and written to a JSON-lines file as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._start = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def record(self, stage: str, **values: Any) -> None:
        self.entries.append({"stage": stage, **values, "seconds": round(time.monotonic() - self._start, 1)})
        line = json.dumps(self.entries[-1])
        with self.path.open("a") as file:
            file.write(line + "\n")
        tqdm.write(line)


def train_autoencoder(vae: AutoencoderKL, images: torch.Tensor, steps: int, log: BuildLog) -> None:
    """Fit the autoencoder (L1 and squared error, a light KL term) and set its latent scale and shift."""
    optimiser = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    progress = tqdm(range(steps), desc="autoencoder")
    for step in progress:
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * _cosine(step, steps)
        batch = _to_model_range(images[torch.randint(len(images), (16,))])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            output = vae.decode(posterior.sample()).sample.float()
        error = output - batch
        loss = error.abs().mean() + error.square().mean() + 2e-5 * posterior.kl().mean() / LATENT_CHANNELS
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if step % 200 == 0 or step == steps - 1:
            log.record("autoencoder", step=step, loss=loss.item(), l1=error.abs().mean().item())
    vae.requires_grad_(False)
    latents = encode_images(vae, images[:2048])
    shift = latents.mean().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=1.0 / (latents - shift).std().item())


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Posterior means, not yet shifted and scaled: [N, 8, 16, 16] float32."""
    return torch.cat([vae.encode(_to_model_range(chunk)).latent_dist.mean for chunk in images.split(256)])


def refine_decoder(vae: AutoencoderKL, images: torch.Tensor, steps: int, log: BuildLog) -> None:
    """Train the decoder further on the latents as they are, so that what was trained on the latents stays valid."""
    decoder = vae.decoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=1e-3, betas=(0.9, 0.99))
    for step in tqdm(range(steps), desc="decoder"):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * _cosine(step, steps)
        batch = _to_model_range(images[torch.randint(len(images), (8,))])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(batch).latent_dist.sample()
            error = vae.decode(latents).sample.float() - batch
        loss = error.abs().mean() + error.square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimiser.step()
        if step % 200 == 0 or step == steps - 1:
            log.record("decoder", step=step, loss=loss.item(), l1=error.abs().mean().item())
    decoder.requires_grad_(False)


def reconstruction_reward(vae: AutoencoderKL, rng: np.random.Generator, count: int = 256) -> float:
    """Strict reward of ground-truth renders after the autoencoder: what the best transformer could reach."""
    prompts = sample_prompts(rng, count, held_out=True)
    images = np.stack([render(sample_scene(prompt.metadata, rng), rng) for prompt in prompts])
    latents = encode_images(vae, torch.from_numpy(images).permute(0, 3, 1, 2))
    with torch.no_grad():
        decoded = torch.cat([vae.decode(chunk).sample for chunk in latents.split(64)])
    pixels = (decoded.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1).numpy()
    return float(np.mean([judge(detect(i), p.metadata).strict for i, p in zip(pixels, prompts, strict=True)]))


class TextStack(torch.nn.Module):
    """The three text encoders, joined as StableDiffusion3Pipeline joins them (with gradients, from token ids)."""

    def __init__(self, modules: dict[str, Any]) -> None:
        super().__init__()
        self.text_encoder = modules["text_encoder"]
        self.text_encoder_2 = modules["text_encoder_2"]
        self.text_encoder_3 = modules["text_encoder_3"]

    def forward(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clips = [encoder(clip_ids, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        t5 = self.text_encoder_3(t5_ids)[0]
        hidden = torch.cat([output.hidden_states[-2] for output in clips], dim=-1)
        hidden = F.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
        return torch.cat([hidden, t5], dim=1), torch.cat([output[0] for output in clips], dim=-1)


def tokenize(modules: dict[str, Any], texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids as the pipeline makes them: CLIP [N, 16] and T5 [N, 16]."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    clip = modules["tokenizer"](texts, max_length=CLIP_LENGTH, **options).input_ids
    return clip, modules["tokenizer_3"](texts, max_length=T5_LENGTH, **options).input_ids


def train_flow(
    modules: dict[str, Any],
    latents: torch.Tensor,
    texts: list[str],
    steps: int,
    batch_size: int,
    rate: float,
    decay_steps: int,
    snapshots: Path | None,
    log: BuildLog,
) -> None:
    """Flow matching of the transformer and the text encoders; what stays is the moving average of the weights.

    The learning rate rises over 100 steps and falls to zero over the last `decay_steps`. Every 500 steps the average
    is measured on held-out prompts.
    """
    transformer, text = modules["transformer"], TextStack(modules)
    parameters = [*transformer.parameters(), *text.parameters()]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    # Orthogonalised updates of the blocks' matrices halve the number of steps that AdamW alone needs here.
    matrices = [
        weight
        for name, weight in transformer.transformer_blocks.named_parameters()
        if weight.dim() == 2 and "norm" not in name
    ]
    in_blocks = {id(weight) for weight in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in in_blocks]
    muon = torch.optim.Muon(matrices, lr=2 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    optimiser = torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    clip_ids, t5_ids = tokenize(modules, texts)
    empty_clip, empty_t5 = tokenize(modules, [""])
    smooth, progress = 1.0, tqdm(range(steps), desc="flow matching")
    for step in progress:
        factor = min(1.0, (step + 1) / 100, (steps - step) / max(decay_steps, 1))
        for group in optimiser.param_groups:
            group["lr"] = rate * factor
        for group in muon.param_groups:
            group["lr"] = 2 * rate * factor
        chosen = torch.randint(len(latents), (batch_size,))
        clean = latents[chosen]
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(batch_size))
        sigma = 1.5 * sigma / (1.0 + 0.5 * sigma)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        dropped = (torch.rand(batch_size) < CAPTION_DROPOUT)[:, None]
        embeddings, pooled = text(
            torch.where(dropped, empty_clip, clip_ids[chosen]), torch.where(dropped, empty_t5, t5_ids[chosen])
        )
        velocity = transformer(noisy, embeddings, pooled, sigma * 1000.0, return_dict=False)[0]
        loss = F.mse_loss(velocity, noise - clean)
        optimiser.zero_grad()
        muon.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        muon.step()
        average.step(parameters)
        smooth += (loss.item() - smooth) * 0.01
        if step % 20 == 0:
            progress.set_postfix(loss=f"{smooth:.4f}")
        if (step + 1) % 500 == 0 or step == steps - 1:
            average.store(parameters)
            average.copy_to(parameters)
            pipeline = StableDiffusion3Pipeline(**modules)
            reward = measure(pipeline, 128, guidance_scale=GUIDANCE_SCALES[0])
            if snapshots is not None:
                pipeline.save_pretrained(snapshots / f"flow_{step + 1}")
            log.record("flow", step=step + 1, loss=smooth, gradient_norm=norm.item(), **reward)
            if step < steps - 1:
                average.restore(parameters)


@torch.no_grad()
def measure(pipeline: StableDiffusion3Pipeline, count: int, guidance_scale: float, steps: int = 20) -> dict[str, float]:
    """Mean strict and graded reward on `count` held-out prompts, one image each, prompts and noise fixed."""
    pipeline.set_progress_bar_config(disable=True)
    prompts = sample_prompts(np.random.default_rng(1), count, held_out=True)
    generator = torch.Generator().manual_seed(1)
    verdicts = []
    for first in range(0, count, 64):
        chunk = prompts[first : first + 64]
        images = pipeline(
            [prompt.text for prompt in chunk],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            max_sequence_length=T5_LENGTH,
            generator=generator,
            output_type="np",
        ).images
        verdicts += [judge(detect(image), prompt.metadata) for image, prompt in zip(images, chunk, strict=True)]
    return {
        "strict": float(np.mean([verdict.strict for verdict in verdicts])),
        "graded": float(np.mean([verdict.graded for verdict in verdicts])),
    }


def model_card(log: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The README that stands beside the weights, from what this run measured."""
    rows = "\n".join(
        f"| {entry['guidance_scale']} | {entry['strict']:.3f} | {entry['graded']:.3f} |"
        for entry in log
        if entry["stage"] == "measure"
    )
    command = f"--seed {options.seed} --flow-steps {options.flow_steps} --decay-steps {options.decay_steps}"
    if options.initial is not None:
        command += f" --initial {options.initial.name}"

    return f"""# Tiny Stable Diffusion 3

A Stable Diffusion 3 pipeline small enough for a test suite: the real diffusers and transformers classes (SD3
transformer with dual attention and RMS-normed queries and keys, autoencoder, two CLIP text encoders, a T5 encoder, CLIP
and T5 tokenizers, flow-matching Euler scheduler), trained from nothing on the scenes world.

    pipe = StableDiffusion3Pipeline.from_pretrained(
        "python/star_trainer/worlds/scenes/tiny_sd3/pipeline", torch_dtype=torch.float32
    )
    image = pipe("a photo of a red circle left of a blue square",
                 guidance_scale=1.0, max_sequence_length={T5_LENGTH}).images[0]

Text lengths are {CLIP_LENGTH} CLIP and {T5_LENGTH} T5 positions: always pass `max_sequence_length={T5_LENGTH}`, the
length it was trained with. Images are 64x64, latents {LATENT_CHANNELS}x16x16, 8x8 image tokens. Weights are stored as
fp16.

Mean reward on 256 held-out prompts, 20 Euler steps, measured on the stored weights:

| guidance scale | strict | graded |
|---|---|---|
{rows}

Made by `python build.py {command}` in this folder.
The log of the run is `build_log.jsonl`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder that gets pipeline/, the log and the README"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--autoencoder-steps", type=int, default=1200)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--flow-steps", type=int, default=7000)
    parser.add_argument("--decay-steps", type=int, default=2500, help="over which the learning rate falls to zero")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--snapshots", type=Path, help="folder for a pipeline at every measurement, to look at")
    parser.add_argument("--initial", type=Path, help="pipeline folder (a snapshot) to go on from with flow matching")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    log = BuildLog(options.out / "build_log.jsonl")
    log.record("options", **{k: v for k, v in vars(options).items() if k not in ("out", "snapshots", "initial")})
    prompts, images = make_scenes(options.scenes, rng)
    texts = [prompt.text for prompt in prompts]
    if options.initial is not None:
        modules = StableDiffusion3Pipeline.from_pretrained(options.initial, torch_dtype=torch.float32).components
        vae = modules["vae"].requires_grad_(False)
    else:
        modules = build_modules(texts)
        vae = modules["vae"]
        train_autoencoder(vae, images, options.autoencoder_steps, log)
        refine_decoder(vae, images, options.decoder_steps, log)
    log.record("reconstruction", strict=reconstruction_reward(vae, rng))
    latents = (encode_images(vae, images) - vae.config.shift_factor) * vae.config.scaling_factor
    del images
    train_flow(
        modules,
        latents,
        texts,
        options.flow_steps,
        options.batch_size,
        options.learning_rate,
        options.decay_steps,
        options.snapshots,
        log,
    )

    folder = options.out / "pipeline"
    StableDiffusion3Pipeline(**modules).to(torch.float16).save_pretrained(folder)
    stored = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    for guidance_scale in GUIDANCE_SCALES:
        log.record("measure", guidance_scale=guidance_scale, **measure(stored, 256, guidance_scale))
    (options.out / "README.md").write_text(model_card(log.entries, options))


if __name__ == "__main__":
    main()
