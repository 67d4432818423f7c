"""Train the tiny CLIP from nothing: ``python build.py --out FOLDER`` in this folder.

Images and captions are those of the scenes world. Every batch holds families: a caption and others that differ from it
in one attribute or in which object has it, each with a scene of its own, so that a bag of words is not enough. Half of
the images have been through the tiny pipeline's autoencoder, with noise on their latents: what the pipeline makes
looks like that. What comes out is an ordinary folder of transformers (``CLIPModel``, ``CLIPProcessor``) with fp16
safetensors, the log of the run and a README that states what was measured. Half an hour on a core that is shared.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from star_trainer.config.paths import TINY_PIPELINE
from star_trainer.prompts import Prompt
from star_trainer.rewards.models.clip import ClipModel, ClipReward
from star_trainer.worlds.requirements import judge
from star_trainer.worlds.scenes.captions import sample_prompts
from star_trainer.worlds.scenes.detector import detect
from star_trainer.worlds.scenes.renderer import IMAGE_SIZE, render, sample_scene
from star_trainer.worlds.scenes.tiny_sd3.build import BuildLog
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

try:
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

FAMILY = 4
CANDIDATES = 32
_MIRRORED = {"right_of": "left_of", "below": "above"}


def words(text: str) -> list[str]:
    """A caption's words; a relation counts as one."""
    return text.replace("left of", "left_of").replace("right of", "right_of").split()


def meaning(text: str) -> tuple[Any, ...]:
    """What a caption says, the same for "a and b" and "b and a", and for "a left of b" and "b right of a"."""
    phrase = words(text.removeprefix("a photo of "))
    for place, word in enumerate(phrase):
        first, second = tuple(phrase[:place]), tuple(phrase[place + 1 :])
        if word == "and":
            return ("and", *sorted((first, second)))
        if word in _MIRRORED:
            return _MIRRORED[word], second, first
        if word in _MIRRORED.values():
            return word, first, second
    return tuple(phrase)


def differ_in_one_attribute(first: str, second: str) -> bool:
    """Whether two captions differ in one word, or in where two words stand, and do not mean the same."""
    one, other = words(first), words(second)
    if len(one) != len(other) or meaning(first) == meaning(second):
        return False
    apart = sum(a != b for a, b in zip(one, other, strict=True))
    return apart == 1 or (apart == 2 and sorted(one) == sorted(other))


def families(prompts: list[Prompt], rng: np.random.Generator) -> list[Prompt]:
    """Each prompt, followed by `FAMILY` - 1 that differ from it in one attribute, from among the prompts."""
    known = {prompt.text: prompt for prompt in prompts}
    siblings: dict[str, list[Prompt]] = {}
    result = []
    for prompt in tqdm(prompts, desc="families"):
        if prompt.text not in siblings:
            siblings[prompt.text] = [p for text, p in known.items() if differ_in_one_attribute(text, prompt.text)]
        close = siblings[prompt.text] or prompts
        result += [prompt, *(close[i] for i in rng.integers(len(close), size=FAMILY - 1))]
    return result


def draw(prompts: list[Prompt], rng: np.random.Generator) -> Tensor:
    """A scene for each prompt: [N, 3, 64, 64] uint8."""
    images = np.stack([render(sample_scene(p.metadata, rng), rng) for p in tqdm(prompts, desc="scenes", leave=False)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def through_autoencoder(vae: AutoencoderKL, images: Tensor, noise: float) -> Tensor:
    """Images [N, 3, 64, 64] uint8 as the autoencoder gives them back, with noise of up to `noise` on their latents."""
    result = []
    for chunk in tqdm(images.split(32), desc="autoencoder", leave=False):
        latents = vae.encode(chunk.float() / 127.5 - 1).latent_dist.mean
        spread = noise * torch.rand(len(chunk), 1, 1, 1) / vae.config.scaling_factor
        decoded = vae.decode(latents + spread * torch.randn_like(latents)).sample
        result.append((decoded * 127.5 + 127.5).clamp(0, 255).round().byte())
    return torch.cat(result)


def build_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained model."""
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
    return CLIPModel(
        CLIPConfig(
            text_config={
                **shape,
                "num_hidden_layers": 2,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": tokenizer.model_max_length,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={**shape, "num_hidden_layers": 5, "image_size": IMAGE_SIZE, "patch_size": 8},
            projection_dim=64,
        )
    )


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """CLIP's own preparation of images, at the size of the scenes."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=side), tokenizer=tokenizer
    )


def jitter(images: Tensor) -> Tensor:
    """Images with other brightness and contrast and some noise."""
    shape = (len(images), 1, 1, 1)
    contrast, brightness = torch.empty(shape).uniform_(0.85, 1.15), torch.empty(shape).uniform_(-0.08, 0.08)
    grain = torch.empty(shape).uniform_(0.0, 0.06) * torch.randn_like(images)
    return ((images - 0.5) * contrast + 0.5 + brightness + grain).clamp(0, 1)


def contrastive_loss(logits: Tensor, meanings: Tensor) -> Tensor:
    """Cross entropy both ways over [B, B] logits, not counting other captions that mean the same."""
    same = (meanings[:, None] == meanings) & ~torch.eye(len(meanings), dtype=torch.bool)
    logits = logits.masked_fill(same, -math.inf)
    target = torch.arange(len(logits))
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def train(
    model: CLIPModel,
    processor: CLIPProcessor,
    images: Tensor,
    prompts: list[Prompt],
    options: argparse.Namespace,
    log: BuildLog,
) -> None:
    """Contrastive training on families; images [N, 3, 64, 64] uint8."""
    texts = [prompt.text for prompt in prompts]
    tokens = processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    number = {value: index for index, value in enumerate(dict.fromkeys(map(meaning, texts)))}
    meanings = torch.tensor([number[meaning(text)] for text in texts])
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)

    matrices = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and ".layers." in name]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    rate = options.learning_rate
    optimisers = [
        torch.optim.Muon(matrices, lr=2 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    model.train()
    smooth, right = math.log(options.batch_size), 0.0
    progress = tqdm(range(options.steps), desc="contrastive")
    for step in progress:
        factor = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for optimiser, scale in zip(optimisers, (2.0, 1.0), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = scale * rate * factor
        chosen = torch.randint(len(images) // FAMILY, (options.batch_size // FAMILY,))
        rows = (chosen[:, None] * FAMILY + torch.arange(FAMILY)).flatten()
        pixels = (jitter(images[rows].float() / 255) - mean) / std
        logits = model(input_ids=tokens[rows], pixel_values=pixels).logits_per_image
        loss = contrastive_loss(logits, meanings[rows])
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        smooth += (loss.item() - smooth) * 0.02
        right += ((logits.argmax(1) == torch.arange(len(logits))).float().mean().item() - right) * 0.02
        progress.set_postfix(loss=f"{smooth:.3f}", right=f"{right:.3f}")
        if (step + 1) % 100 == 0 or step == options.steps - 1:
            log.record("contrastive", step=step + 1, loss=smooth, right=right, scale=model.logit_scale.exp().item())
    model.eval()


def candidates(prompt: Prompt, prompts: list[Prompt], rng: np.random.Generator, *, close: bool) -> list[str]:
    """A caption and 31 others, all different: at random, or those that differ in one attribute as far as they go."""
    own = meaning(prompt.text)
    others = [other.text for other in prompts if meaning(other.text) != own]
    others = [others[i] for i in rng.permutation(len(others))]
    if close:
        others.sort(key=lambda text: not differ_in_one_attribute(text, prompt.text))
    return [prompt.text, *others[: CANDIDATES - 1]]


def rank_first(clip: ClipModel, images: Tensor, prompts: list[Prompt], seed: int, *, close: bool) -> float:
    """Share of images [N, 3, 64, 64] uint8 whose own caption scores highest among `CANDIDATES`."""
    rng = np.random.default_rng(seed)
    held_out = sample_prompts(rng, 240, held_out=True, distinct=True)
    texts = list(dict.fromkeys(prompt.text for prompt in [*held_out, *prompts]))
    row = {text: index for index, text in enumerate(texts)}
    with torch.no_grad():
        embedded, captions = clip.embed_pixels(clip.pixels(images.float() / 255)), clip.embed_texts(texts)
    first = 0
    for image, prompt in zip(embedded, prompts, strict=True):
        rows = [row[text] for text in candidates(prompt, held_out, rng, close=close)]
        first += int((captions[rows] @ image).argmax() == 0)
    return first / len(prompts)


def measure(clip: ClipModel, vae: AutoencoderKL, count: int, seed: int = 1) -> dict[str, float]:
    """How often the right caption comes first, on `count` scenes of held-out captions."""
    rng = np.random.default_rng(seed)
    prompts = sample_prompts(rng, count, held_out=True)
    images = draw(prompts, rng)
    decoded = through_autoencoder(vae, images, noise=0.0)
    return {
        "scenes": count,
        "rank_first": rank_first(clip, images, prompts, seed, close=False),
        "rank_first_decoded": rank_first(clip, decoded, prompts, seed, close=False),
        "rank_first_close": rank_first(clip, images, prompts, seed, close=True),
        "rank_first_close_decoded": rank_first(clip, decoded, prompts, seed, close=True),
    }


def measure_on_pipeline(clip: ClipModel, prompts: int, samples: int = 8, seed: int = 2) -> dict[str, float]:
    """How well the score tells, of the tiny pipeline's images for one prompt, those that meet it from the others."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(TINY_PIPELINE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    reward = ClipReward(clip, scale="percent")
    scores, met = [], []
    for prompt in tqdm(sample_prompts(np.random.default_rng(seed), prompts, held_out=True), desc="pipeline"):
        images = pipeline(
            [prompt.text] * samples,
            num_inference_steps=20,
            guidance_scale=1.0,
            max_sequence_length=16,
            generator=generator,
            output_type="np",
        ).images
        levels = np.round(images * 255).astype(np.uint8)
        scores.append(reward(levels, [prompt] * samples))
        met.append(np.array([judge(detect(image), prompt.metadata).strict == 1.0 for image in levels]))
    pairs = [s[m][:, None] > s[~m] for s, m in zip(scores, met, strict=True)]
    every, right = np.concatenate(scores), np.concatenate(met)
    return {
        "images": len(every),
        "strict": float(right.mean()),
        "score_met": float(every[right].mean()),
        "score_not_met": float(every[~right].mean()),
        "ordered": float(np.concatenate([pair.ravel() for pair in pairs]).mean()),
    }


def model_card(log: list[dict[str, Any]], folder: Path, options: argparse.Namespace) -> str:
    """The README that stands beside the weights, from what this run measured."""
    by_stage = {entry["stage"]: entry for entry in log}
    scenes, found, made = by_stage["scenes"], by_stage["measure"], by_stage["pipeline"]
    parameters, met, not_met = by_stage["model"]["parameters"], made["score_met"], made["score_not_met"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"""# Tiny CLIP

A CLIP small enough for a test suite: transformers' `CLIPModel` and `CLIPProcessor`, trained from nothing on the scenes
world of `star_trainer.worlds.scenes`. It is what `reward.models.clip=tiny` stands for:

    star-train tiny "reward.terms={{clip_score: 0.01}}" reward.models.clip=tiny

{parameters:,} parameters in fp16; `model/` takes {size:,} bytes, the tokenizer (that of the tiny
pipeline) included. Images are {IMAGE_SIZE}x{IMAGE_SIZE} in patches of 8, texts at most 16 tokens.

Trained contrastively on {scenes["scenes"]:,} scenes of {scenes["captions"]:,} captions, none of them held out,
in families of {FAMILY} captions that differ in one attribute or in which object has it; {scenes["decoded"]:,} of the
scenes are as the tiny pipeline's autoencoder gives them back, with noise on their latents.

Measured on the stored weights, {found["scenes"]:,} scenes of held-out captions: how often the right one
of {CANDIDATES} captions, none of which means the same, scores highest.

| the other {CANDIDATES - 1} | scenes as drawn | through the autoencoder |
|---|---|---|
| held-out captions at random | {found["rank_first"]:.3f} | {found["rank_first_decoded"]:.3f} |
| first those that differ in one attribute | {found["rank_first_close"]:.3f} | {found["rank_first_close_decoded"]:.3f} |

On {made["images"]} images of the tiny pipeline, 8 for each of 64 held-out prompts, {made["strict"]:.3f} of which
meet their prompt: of two images of one prompt, one that meets it and one that does not, the right one scores higher in
{made["ordered"]:.3f} of the pairs. Mean scores are {met:.1f} and {not_met:.1f} (cosine times 100).

Made by `python build.py --seed {options.seed}` in this folder. The log of the run is `build_log.jsonl`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder that gets model/, the log and the README"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=1000, help="scenes of held-out captions for the measurement")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    log = BuildLog(options.out / "build_log.jsonl")
    log.record("options", **{key: value for key, value in vars(options).items() if key != "out"})
    vae = AutoencoderKL.from_pretrained(TINY_PIPELINE, subfolder="vae", torch_dtype=torch.float32)
    prompts = families(sample_prompts(rng, options.families, held_out=False), rng)
    images = draw(prompts, rng)
    # Whole families, so that what an image has been through does not tell it from its family.
    half = len(images) // FAMILY // 2 * FAMILY
    images[:half] = through_autoencoder(vae, images[:half], noise=0.3)
    log.record("scenes", scenes=len(images), decoded=half, captions=len({prompt.text for prompt in prompts}))

    tokenizer = CLIPTokenizer.from_pretrained(TINY_PIPELINE, subfolder="tokenizer")
    model, processor = build_model(tokenizer), build_processor(tokenizer)
    log.record("model", parameters=sum(parameter.numel() for parameter in model.parameters()))
    train(model, processor, images, prompts, options, log)

    folder = options.out / "model"
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    stored = ClipModel(str(folder), key="--out")
    log.record("measure", **measure(stored, vae, options.held_out))
    log.record("pipeline", **measure_on_pipeline(stored, 64))
    (options.out / "README.md").write_text(model_card(log.entries, folder, options))


if __name__ == "__main__":
    main()
