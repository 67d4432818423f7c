"""Where a text-to-image model looks for each word of a prompt, as one picture.

    python examples/attention_maps.py
    python examples/attention_maps.py "a red fox on a mossy stone" \
        --pipeline stabilityai/stable-diffusion-3.5-medium --units "red fox" "mossy stone"

Any pipeline whose text `TextUnits.from_pipeline` knows and whose model `record_attention` does: Stable Diffusion 1.5,
XL, 3 and 3.5, FLUX, Qwen-Image, Z-Image. A map is the attention that image tokens pay to a unit, the mean over layers,
heads and steps, captured while the picture is sampled.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image
from star_trainer.config.paths import TINY_PIPELINE

import star_kernels as sk

COLUMNS = 5


def sample(
    pipe: Any, prompt: str, names: list[str], steps: slice, **options: Any
) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """A picture, and by unit its map [h, w]: 1 where a token looks there as much as the picture does on average.

    `steps` picks the denoising steps that are averaged.
    """
    units = sk.TextUnits.from_pipeline(pipe, [prompt], [names])
    if units.missing[0]:
        raise SystemExit(f"--units: expected words of the prompt that the model reads, got {units.missing[0]}")

    grids = []

    def end_of_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        grids.append(recorder.grid)
        recorder.next_step()
        return {}

    # The row with the text is the last one, whether guidance is in the batch or not, but for Z-Image, where it is the
    # first. Where guidance is a pass of its own, that is the second one.
    model = getattr(pipe, "transformer", None) or pipe.unet
    rows = slice(1) if type(pipe).__name__ == "ZImagePipeline" else slice(-1, None)
    with sk.record_attention(model, units, rows=rows, record_pass=0) as recorder:
        picture = pipe(prompt=prompt, callback_on_step_end=end_of_step, **options).images[0]
    mass = torch.stack(recorder.history)[steps].mean(0)[0].cpu()  # [tokens, units]
    # A transformer has one token for so many pixels either way; a U-Net says at which resolution it looked.
    high = round((len(mass) * picture.height / picture.width) ** 0.5)
    height, width = grids[0] or (high, len(mass) // high)
    maps = (mass / mass.mean(0)).T.reshape(len(names), height, width).numpy()
    return picture, dict(zip(names, maps, strict=True))


def draw(picture: Image.Image, maps: dict[str, np.ndarray], title: str, path: Path) -> None:
    """The picture, and by unit its map over it in grey."""
    panels = [(title, None), *maps.items()]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.7 * rows), layout="constrained")
    extent = (0, picture.width, picture.height, 0)
    for place, (name, values) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(picture if values is None else picture.convert("L"), cmap="gray", extent=extent)
        if values is not None:
            axes.imshow(values, cmap="viridis", alpha=0.65, extent=extent, interpolation="bilinear")
        peak = "" if values is None else f"\nat most {values.max():.1f} times its mean"
        axes.set_title(f"{name if len(name) < 30 else name[:29] + '…'}{peak}", fontsize=8)
        axes.axis("off")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a photo of a red circle left of a blue square")
    parser.add_argument("--pipeline", default=str(TINY_PIPELINE), help="a folder, or a name on the hub")
    parser.add_argument("--units", nargs="+", help="phrases of the prompt; by default each of its words")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--from-step", type=int, default=0, help="the first step of the mean: early maps are vague")
    parser.add_argument("--guidance", type=float, help="guidance scale; by default the pipeline's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("attention_maps.png"))
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(options.pipeline, torch_dtype=dtype).to(device)
    picture, maps = sample(
        pipe,
        options.prompt,
        options.units or list(dict.fromkeys(re.findall(r"[\w'-]+", options.prompt))),
        slice(options.from_step, None),
        num_inference_steps=options.steps,
        generator=torch.Generator(device).manual_seed(options.seed),
        **({} if options.guidance is None else {"guidance_scale": options.guidance}),
    )
    draw(picture, maps, options.prompt, options.out)
    print(f"{options.out}: {', '.join(maps)}")
    return maps


if __name__ == "__main__":
    main()
