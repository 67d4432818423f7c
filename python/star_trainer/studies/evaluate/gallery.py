"""Pictures in GenEval's folders: each is made once, written whole or not at all, and found again."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from star_trainer.config import Config, ConfigError
from star_trainer.families.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.run.files import write_atomically
from star_trainer.run.randomness import stream
from star_trainer.sampling import denoise

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Gallery:
    """``ROOT/00000/metadata.jsonl`` and ``ROOT/00000/samples/0000.png`` and so on, a folder per prompt.

    GenEval's own scorer reads such a root.
    """

    root: Path
    prompts: Sequence[Prompt]
    samples: int

    def path(self, prompt: int, sample: int) -> Path:
        return self.root / f"{prompt:05d}" / "samples" / f"{sample:04d}.png"

    def open(self, settings: dict[str, Any]) -> None:
        """Make the folders, or take up those of an earlier call.

        Args:
            settings: what decides the pictures, by name.

        Raises:
            ConfigError: the pictures that are there were made with other settings or for other prompts.
        """
        path, settings = self.root / _SETTINGS, json.loads(json.dumps(settings))
        if path.is_file():
            saved = _read_json(path)
            for name, value in settings.items():
                if saved.get(name) != value:
                    raise ConfigError(
                        f"--out: the pictures in {self.root} were made with {name} {saved.get(name)!r}, not "
                        f"{value!r}; name another folder"
                    )
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=2).encode())
        for place, prompt in enumerate(self.prompts):
            folder = self.root / f"{place:05d}"
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            metadata = {"prompt": prompt.text, **prompt.metadata}
            path = folder / "metadata.jsonl"
            if not path.is_file():
                write_atomically(path, (json.dumps(metadata) + "\n").encode())
            elif _read_json(path) != json.loads(json.dumps(metadata)):
                raise ConfigError(f"--out: {folder} belongs to another prompt; name another folder")

    def places(self) -> Iterator[tuple[int, int]]:
        """All prompts and samples, sample by sample of a prompt."""
        return ((prompt, sample) for prompt in range(len(self.prompts)) for sample in range(self.samples))

    def missing(self) -> list[tuple[int, int]]:
        return [place for place in self.places() if not self.path(*place).is_file()]

    def write(self, place: tuple[int, int], image: np.ndarray) -> None:
        content = io.BytesIO()
        Image.fromarray(image).save(content, format="png")
        write_atomically(self.path(*place), content.getvalue())

    def read(self, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """Images [B, H, W, 3] uint8.

        Raises:
            ConfigError: a picture that cannot be read, or of another size than the others.
        """
        images: list[np.ndarray] = []
        for place in places:
            path = self.path(*place)
            try:
                with Image.open(path) as picture:
                    images.append(np.asarray(picture.convert("RGB")))
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
                raise ConfigError(f"--out: {path} cannot be read ({error}); remove it to have it made again") from error
            if images[-1].shape != images[0].shape:
                raise ConfigError(f"--out: {path} is not of the other pictures' size; remove it to have it made again")
        return np.stack(images)


def batches_of(missing: Sequence[tuple[int, int]], size: int, accelerator: Accelerator) -> list[list[tuple[int, int]]]:
    """This process's batches of the pictures that are missing: every n-th of n processes.

    Batches are the same however many processes share them, and so are their pictures, to the bit.
    """
    batches = [list(missing[first : first + size]) for first in range(0, len(missing), size)]
    return batches[accelerator.process_index :: accelerator.num_processes]


def draw(gallery: Gallery, batches: Sequence[list[tuple[int, int]]], policy: Policy, config: Config, bar: tqdm) -> None:
    """Make pictures, batch by batch, with the pipeline's own sampler.

    The noise of a picture depends on the seed, the place of its prompt and its sample alone: whatever model makes it,
    in whatever batch.
    """
    policy.encode_ahead([gallery.prompts[prompt].text for batch in batches for prompt, _ in batch])
    for places in batches:
        noise = [
            torch.randn(policy.latent_shape, generator=stream(config.run.seed, "star-eval", *place)) for place in places
        ]
        trajectory = denoise(
            policy,
            policy.encode([gallery.prompts[prompt].text for prompt, _ in places]),
            steps=config.evaluation.steps,
            kind="ode",
            generator=stream(config.run.seed, "star-eval"),
            initial=torch.stack(noise),
            guidance_scale=config.evaluation.guidance_scale,
            backend=config.backend,
        )
        for place, image in zip(places, policy.decode(trajectory.latents[-1]), strict=True):
            gallery.write(place, image)
            bar.update()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out: {path} cannot be read ({error}); name another folder") from error
