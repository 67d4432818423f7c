"""GenEval's reward: objects by instance segmentation, their colours by CLIP, and the prompt's requirements on both.

After GenEval (Ghosh et al. 2023, arXiv 2310.11513), with its thresholds; Mask2Former comes from transformers instead of
MMDetection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from star_trainer.config import ConfigError
from star_trainer.config.paths import folder_or_name
from star_trainer.families.loading import load_whole
from star_trainer.prompts import Prompt
from star_trainer.prompts.prompt import required
from star_trainer.rewards.clip import ClipModel
from star_trainer.rewards.geneval_classes import COLOURS, geneval_names
from star_trainer.worlds.requirements import DetectedObject

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MOST_OBJECTS = 16  # of one class
_BACKGROUND = (153, 153, 153)  # GenEval's #999


class GenEvalReward:
    """A score of what is detected in images and of the requirements in their prompts' metadata.

    Called with images [B, H, W, 3] uint8 and their prompts; returns [B] float64.
    """

    def __init__(
        self, detector: Detector, score: Callable[[Sequence[DetectedObject], Mapping[str, Any]], float]
    ) -> None:
        self.detector = detector
        self.score = score

    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        pairs = zip(images, prompts, strict=True)
        return np.array([self.score(self.detector(image, prompt.metadata), prompt.metadata) for image, prompt in pairs])


class Detector:
    """The objects in an image, with the colours of those whose colour is asked for.

    Args:
        detector: a Mask2Former of transformers with COCO's classes.
        clip: tells colours.

    Raises:
        ConfigError: the detector cannot be loaded whole, or lacks classes of GenEval.
    """

    def __init__(self, detector: str, clip: ClipModel) -> None:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        source = folder_or_name(detector, "reward.models.detector")
        self.clip = clip
        self.device = clip.device
        try:
            self.model = load_whole(Mask2FormerForUniversalSegmentation, source)
            self.processor = AutoImageProcessor.from_pretrained(source)
            self.names = geneval_names(self.model.config.id2label)
        except (OSError, ValueError) as error:
            raise ConfigError(f"reward.models.detector: {detector} cannot be used: {error}") from error
        self.model = self.model.to(self.device).eval().requires_grad_(False)
        self._classifiers: dict[str, torch.Tensor] = {}

    def __call__(self, image: np.ndarray, metadata: dict[str, Any]) -> list[DetectedObject]:
        """The objects in an image [H, W, 3] uint8 that count for a prompt, at most 16 of a class, best first."""
        threshold = COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD
        coloured = {entry["class"] for entry in required(metadata, "include") if "color" in entry}
        by_class: dict[str, list[tuple[float, np.ndarray]]] = {}
        for name, score, mask in self.instances(image, threshold):
            by_class.setdefault(name, []).append((score, mask))
        objects = []
        for name, found in by_class.items():
            best = sorted(found, key=lambda item: -item[0])[:MOST_OBJECTS]
            masks = [mask for _, mask in best]
            colours = self.colours(image, masks, name) if name in coloured else [None] * len(best)
            objects += [
                DetectedObject(name, score, colour, box_of(mask))
                for (score, mask), colour in zip(best, colours, strict=True)
            ]
        return objects

    @torch.no_grad()
    def instances(self, image: np.ndarray, threshold: float) -> list[tuple[str, float, np.ndarray]]:
        """Class, confidence above `threshold` and mask [H, W] bool of each instance that covers at least one pixel."""
        inputs = self.processor(images=Image.fromarray(image), return_tensors="pt").to(self.device)
        (found,) = self.processor.post_process_instance_segmentation(
            self.model(**inputs), threshold=threshold, target_sizes=[image.shape[:2]], return_binary_maps=True
        )
        segments = found["segments_info"]
        if not segments:
            return []
        masks = np.asarray(found["segmentation"].cpu()) > 0.5
        named = [(self.names[s["label_id"]], float(s["score"]), mask) for s, mask in zip(segments, masks, strict=True)]
        return [entry for entry in named if entry[2].any()]

    @torch.no_grad()
    def colours(self, image: np.ndarray, masks: Sequence[np.ndarray], name: str) -> list[str | None]:
        """The colour of each object of class `name`, by CLIP, from its box with everything else painted grey."""
        if name not in self._classifiers:
            self._classifiers[name] = self._classifier(name)
        chosen: list[str | None] = []
        for mask in masks:
            crop = masked_crop(image, mask)
            similarity = self.clip.embed_images(crop[None]) @ self._classifiers[name]
            chosen.append(COLOURS[int(similarity.argmax())])
        return chosen

    def _classifier(self, name: str) -> torch.Tensor:
        """[D, colours]: per colour the mean direction of three descriptions."""
        columns = []
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} {name}",
                f"a photo of a {colour}-colored {name}",
                f"a photo of a {colour} object",
            ]
            columns.append(functional.normalize(self.clip.embed_texts(texts).mean(0), dim=-1))
        return torch.stack(columns, dim=1)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a mask [H, W] bool that covers at least one pixel; the ends are exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def masked_crop(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mask's box of an image [H, W, 3] uint8, grey where the mask does not cover it."""
    left, top, right, bottom = map(int, box_of(mask))
    crop = np.where(mask[..., None], image, np.array(_BACKGROUND, dtype=np.uint8))
    return np.ascontiguousarray(crop[top:bottom, left:right])
