"""Train the tiny preference model: ``python build.py --out FOLDER`` in this folder.

A rater who is sometimes wrong has compared two images for one prompt; the tiny CLIP learns from that which of two is
liked better, as PickScore learnt it from CLIP-H (arXiv 2305.01569): cross entropy between the rater's choice and the
softmax over both images' logits. Half of a prompt's images are the tiny pipeline's own, the others scenes that meet it
or come close, as the autoencoder gives them back. What comes out is an ordinary folder of transformers (``CLIPModel``,
``CLIPProcessor``) with fp16 safetensors, the log of the run and a README that states what was measured.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from star_trainer.config.paths import TINY_CLIP, TINY_PIPELINE
from star_trainer.prompts import Prompt
from star_trainer.rewards.models.clip import ClipModel
from star_trainer.worlds.requirements import judge
from star_trainer.worlds.scenes.captions import sample_prompts
from star_trainer.worlds.scenes.detector import detect
from star_trainer.worlds.scenes.tiny_clip.build import (
    differ_in_one_attribute,
    draw,
    jitter,
    through_autoencoder,
)
from star_trainer.worlds.scenes.tiny_sd3.build import BuildLog
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

# How strongly the rater leans to the image that meets more of the prompt: log-odds per unit of that share.
RATER = 6.0
_KINDS = 4


@dataclass(frozen=True)
class Pairs:
    """Comparisons: prompt [M], both images [M, 2] as rows of `images`, how much each meets [M, 2], the choice [M].

    `images` [N, 3, 64, 64] uint8; a choice is the probability that the first is the better one: 1, 0, or 0.5 for a tie.
    """

    prompts: list[Prompt]
    images: Tensor
    prompt: np.ndarray
    pair: np.ndarray
    met: np.ndarray
    choice: np.ndarray


def pipeline_images(prompts: Sequence[Prompt], seed: int) -> Tensor:
    """An image of the tiny pipeline for each prompt: [N, 3, 64, 64] uint8."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(TINY_PIPELINE, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    made = []
    for first in tqdm(range(0, len(prompts), 32), desc="pipeline"):
        images = pipeline(
            [prompt.text for prompt in prompts[first : first + 32]],
            num_inference_steps=10,
            guidance_scale=1.0,
            max_sequence_length=16,
            generator=generator,
            output_type="np",
        ).images
        made.append(torch.from_numpy(np.round(images * 255).astype(np.uint8)).permute(0, 3, 1, 2))
    return torch.cat(made).contiguous()


def siblings(prompts: Sequence[Prompt], rng: np.random.Generator) -> list[Prompt]:
    """For each prompt another one that differs from it in one attribute, where there is one."""
    known = list({prompt.text: prompt for prompt in prompts}.values())
    close = {p.text: [o for o in known if differ_in_one_attribute(o.text, p.text)] or known for p in known}
    return [close[prompt.text][rng.integers(len(close[prompt.text]))] for prompt in prompts]


def how_much_is_met(images: Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
    """The share of its prompt's requirements that each image [N, 3, 64, 64] meets, extra objects counted against it."""
    pictures = images.permute(0, 2, 3, 1).numpy()
    both = zip(tqdm(pictures, desc="detector"), prompts, strict=True)
    return np.array([judge(detect(image), prompt.metadata, punish_extras=True).graded for image, prompt in both])


def rate(met: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the rater says about pairs [M, 2]: a tie where both meet the same, else a choice that may be wrong."""
    difference = met[:, 0] - met[:, 1]
    chosen = (rng.random(len(met)) < 1 / (1 + np.exp(-RATER * difference))).astype(float)
    return np.where(difference == 0, 0.5, chosen)


def compare(prompts: list[Prompt], per_prompt: int, vae: AutoencoderKL, seed: int) -> Pairs:
    """Eight images for each prompt, and `per_prompt` pairs of them that the rater has compared."""
    rng = np.random.default_rng(seed)
    copies = [prompt for prompt in prompts for _ in range(_KINDS)]
    half = [prompt for prompt in prompts for _ in range(_KINDS // 2)]
    shown = [p for pair in zip(half, siblings(half, rng), strict=True) for p in pair]
    made = pipeline_images(copies, seed)
    scenes = through_autoencoder(vae, draw(shown, rng), noise=0.3)
    images = torch.cat([made.view(len(prompts), _KINDS, 3, 64, 64), scenes.view(len(prompts), _KINDS, 3, 64, 64)], 1)
    images = images.flatten(0, 1)
    each = 2 * _KINDS
    met = how_much_is_met(images, [prompt for prompt in prompts for _ in range(each)])
    prompt = np.repeat(np.arange(len(prompts)), per_prompt)
    pair = np.stack([rng.permutation(each)[:2] for _ in prompt]) + each * prompt[:, None]
    return Pairs(prompts, images, prompt, pair, met[pair], rate(met[pair], rng))


def train(model: CLIPModel, processor: CLIPProcessor, pairs: Pairs, options: argparse.Namespace, log: BuildLog) -> None:
    """Cross entropy between the rater's choices and the softmax over both images' logits."""
    texts = [prompt.text for prompt in pairs.prompts]
    tokens = processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    choice = torch.from_numpy(pairs.choice).float()
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    order = torch.cat(
        [torch.randperm(len(choice)) for _ in range(-(-options.steps * options.batch_size // len(choice)))]
    )
    smooth, right = math.log(2), 0.5
    model.train()
    for step in tqdm(range(options.steps), desc="preference"):
        factor = min(1.0, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.steps)))
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate * factor
        rows = order[step * options.batch_size : (step + 1) * options.batch_size]
        pixels = (jitter(pairs.images[torch.from_numpy(pairs.pair)[rows].flatten()].float() / 255) - mean) / std
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        seen = functional.normalize(model.visual_projection(pooled), dim=-1).view(len(rows), 2, -1)
        read = model.text_model(input_ids=tokens[torch.from_numpy(pairs.prompt)[rows]]).pooler_output
        read = functional.normalize(model.text_projection(read), dim=-1)
        logits = model.logit_scale.exp() * torch.einsum("bpd,bd->bp", seen, read)
        wanted = torch.stack([choice[rows], 1 - choice[rows]], 1)
        loss = functional.cross_entropy(logits, wanted)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decided = wanted[:, 0] != 0.5
        agrees = (logits.argmax(1) == wanted.argmax(1))[decided].float().mean().item()
        smooth, right = smooth + (loss.item() - smooth) * 0.05, right + (agrees - right) * 0.05
        if (step + 1) % 50 == 0 or step == options.steps - 1:
            log.record("preference", step=step + 1, loss=smooth, agrees_with_rater=right)
    model.eval()


def measure(clip: ClipModel, pairs: Pairs) -> dict[str, float]:
    """How often the model prefers what the rater chose, and what meets more; of pairs that are not tied."""
    with torch.no_grad():
        embedded = torch.cat([clip.embed_pixels(clip.pixels(part.float() / 255)) for part in pairs.images.split(64)])
        texts = clip.embed_texts([prompt.text for prompt in pairs.prompts])[pairs.prompt]
        scores = torch.einsum("mpd,md->mp", embedded[torch.from_numpy(pairs.pair)], texts).numpy()
    untied = pairs.choice != 0.5
    prefers = scores[:, 0] > scores[:, 1]
    own = untied & (pairs.pair % (2 * _KINDS) < _KINDS).all(1)
    better = pairs.met[:, 0] > pairs.met[:, 1]
    return {
        "pairs": int(untied.sum()),
        "agrees_with_rater": float((prefers == (pairs.choice == 1))[untied].mean()),
        "prefers_what_meets_more": float((prefers == better)[untied].mean()),
        "rater_is_right": float(((pairs.choice == 1) == better)[untied].mean()),
        "pairs_of_the_pipeline": int(own.sum()),
        "prefers_what_meets_more_pipeline": float((prefers == better)[own].mean()),
    }


def model_card(log: list[dict[str, Any]], folder: Path, options: argparse.Namespace) -> str:
    """The README that stands beside the weights, from what this run measured."""
    by_stage = {entry["stage"]: entry for entry in log}
    data, before, after = by_stage["pairs"], by_stage["before"], by_stage["after"]
    size = sum(path.stat().st_size for path in folder.iterdir())
    rows = "\n".join(
        f"| {name} | {found['agrees_with_rater']:.3f} | {found['prefers_what_meets_more']:.3f} | "
        f"{found['prefers_what_meets_more_pipeline']:.3f} |"
        for name, found in (("tiny CLIP, where it started", before), ("tiny preference model", after))
    )
    return f"""# Tiny preference model

PickScore small enough for a test suite: transformers' `CLIPModel` and `CLIPProcessor` in the format of
`yuvalkirstain/PickScore_v1`, trained on pairs of images that a rater has compared who is sometimes wrong. It is what
`reward.models.pickscore=tiny` stands for, and the reward of the preset `tiny_pickscore`:

    star-train tiny_pickscore

`model/` takes {size:,} bytes, the tokenizer included. The score is the model's logit, as PickScore's.

The tiny CLIP was trained on {data["pairs"]:,} pairs for {data["prompts"]:,} prompts, none of them held out, of
{data["images"]:,} images: half of them are the tiny pipeline's, the others scenes that meet the prompt or differ in one
attribute, as the autoencoder gives them back with noise on their latents. The rater chooses the image that meets more
of the prompt with the odds exp({RATER:g} d), where d is how much more of its requirements it meets (extra objects count
against it), and calls it a tie where both meet the same ({data["ties"]:.3f} of the pairs).

Measured on the stored weights, {after["pairs"]:,} held-out pairs of held-out prompts that are not tied, of which
{after["pairs_of_the_pipeline"]:,} are of two images of the pipeline. The rater is right in
{after["rater_is_right"]:.3f} of them, which is the most that agreeing with it can reach.

| model | agrees with the rater | prefers what meets more | the same, images of the pipeline |
|---|---|---|---|
{rows}

Made by `python build.py --seed {options.seed}` in this folder. The log of the run is `build_log.jsonl`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder that gets model/, the log and the README"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=10, help="per prompt")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs per step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--held-out", type=int, default=150, help="held-out prompts for the measurement")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    log = BuildLog(options.out / "build_log.jsonl")
    log.record("options", **{key: value for key, value in vars(options).items() if key != "out"})
    vae = AutoencoderKL.from_pretrained(TINY_PIPELINE, subfolder="vae", torch_dtype=torch.float32)
    rng = np.random.default_rng(options.seed)
    training = sample_prompts(rng, options.prompts, held_out=False, distinct=True)
    pairs = compare(training, options.pairs, vae, options.seed)
    held_out = compare(sample_prompts(rng, options.held_out, held_out=True, distinct=True), options.pairs, vae, 1)
    ties = float((pairs.choice == 0.5).mean())
    log.record("pairs", pairs=len(pairs.pair), prompts=len(training), images=len(pairs.images), ties=ties)

    log.record("before", **measure(ClipModel("tiny", key="reward.models.clip"), held_out))
    model, processor = CLIPModel.from_pretrained(TINY_CLIP).float(), CLIPProcessor.from_pretrained(TINY_CLIP)
    train(model, processor, pairs, options, log)
    folder = options.out / "model"
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    log.record("after", **measure(ClipModel(str(folder), key="--out"), held_out))
    (options.out / "README.md").write_text(model_card(log.entries, folder, options))


if __name__ == "__main__":
    main()
