"""GenEval's reward: objects by instance segmentation, their colours by CLIP, and the prompt's requirements on both.

After GenEval (Ghosh et al. 2023, arXiv 2310.11513), with its thresholds; Mask2Former comes from transformers instead of
MMDetection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
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
from star_trainer.rewards.geneval_classes import COLOURS, geneval_names
from star_trainer.rewards.models.clip import ClipModel
from star_trainer.worlds.requirements import DetectedObject

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MOST_OBJECTS = 16  # of one class
_AT_ONCE = 8  # images in one pass of the detector
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
        metadata = [prompt.metadata for prompt in prompts]
        found = self.detector(images, metadata)
        return np.array([self.score(objects, entry) for objects, entry in zip(found, metadata, strict=True)])


class Detector:
    """The objects in images, with the colours of those whose colour is asked for.

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

    def __call__(self, images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> list[list[DetectedObject]]:
        """For each of B images [B, H, W, 3] uint8 what counts for its prompt: at most 16 of a class, best first."""
        counting = [entry.get("tag") == "counting" for entry in metadata]
        thresholds = [COUNTING_THRESHOLD if counts else THRESHOLD for counts in counting]
        found: list[list[DetectedObject]] = []
        places: list[tuple[int, int]] = []
        crops: list[np.ndarray] = []
        for image, entry, instances in zip(images, metadata, self.instances(images, thresholds), strict=True):
            coloured = {wanted["class"] for wanted in required(entry, "include") if "color" in wanted}
            by_class: dict[str, list[tuple[float, np.ndarray]]] = {}
            for name, score, mask in instances:
                by_class.setdefault(name, []).append((score, mask))
            objects: list[DetectedObject] = []
            for name, same in by_class.items():
                for score, mask in sorted(same, key=lambda item: -item[0])[:MOST_OBJECTS]:
                    if name in coloured:
                        places.append((len(found), len(objects)))
                        crops.append(masked_crop(image, mask))
                    objects.append(DetectedObject(name, score, None, box_of(mask)))
            found.append(objects)
        colours = self.colours(crops, [found[row][place].name for row, place in places])
        for (row, place), colour in zip(places, colours, strict=True):
            found[row][place] = replace(found[row][place], colour=colour)
        return found

    @torch.no_grad()
    def instances(
        self, images: np.ndarray, thresholds: Sequence[float]
    ) -> Iterator[list[tuple[str, float, np.ndarray]]]:
        """Per image [H, W, 3] uint8 what covers at least one pixel: class, confidence above its threshold, mask [H, W].

        Image by image, for a mask is as large as the image and there may be a hundred; at most 8 images in one pass.
        """
        for first in range(0, len(images), _AT_ONCE):
            pictures = [Image.fromarray(image) for image in images[first : first + _AT_ONCE]]
            outputs = self.model(**self.processor(images=pictures, return_tensors="pt").to(self.device))
            for row, threshold in enumerate(thresholds[first : first + _AT_ONCE]):
                (found,) = self.processor.post_process_instance_segmentation(
                    SimpleNamespace(
                        class_queries_logits=outputs.class_queries_logits[row : row + 1],
                        masks_queries_logits=outputs.masks_queries_logits[row : row + 1],
                    ),
                    threshold=threshold,
                    target_sizes=[images.shape[1:3]],
                    return_binary_maps=True,
                )
                yield self._named(found)

    def _named(self, found: Mapping[str, Any]) -> list[tuple[str, float, np.ndarray]]:
        segments = found["segments_info"]
        if not segments:
            return []
        masks = np.asarray(found["segmentation"].cpu()) > 0.5
        named = [(self.names[s["label_id"]], float(s["score"]), mask) for s, mask in zip(segments, masks, strict=True)]
        return [entry for entry in named if entry[2].any()]

    @torch.no_grad()
    def colours(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> list[str]:
        """The colour of each object by CLIP, from its `masked_crop` and the name of its class."""
        if not crops:
            return []
        for name in set(names) - self._classifiers.keys():
            self._classifiers[name] = self._classifier(name)
        embedded = self.clip.embed_images(crops)
        similarities = [row @ self._classifiers[name] for row, name in zip(embedded, names, strict=True)]
        return [COLOURS[place] for place in torch.stack(similarities).argmax(-1).tolist()]

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
