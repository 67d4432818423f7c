"""Rendered text: how close what RapidOCR reads in an image comes to the texts that the prompt quotes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from rapidfuzz.distance import Levenshtein

from star_trainer.config import ConfigError
from star_trainer.families.devices import own_threads
from star_trainer.prompts import Prompt
from star_trainer.rewards.errors import RewardError
from star_trainer.rewards.spelling import spellings, wanted

_LONGEST = 8  # times the shorter side: RapidOCR enlarges that one to 736 pixels, whatever becomes of the longer one
_MOST_ORDERS = 4  # texts of which every order is tried: 24 comparisons


class OcrReward:
    """Reads every image with RapidOCR, whose wheel carries its models, and scores it with `text_score`.

    Called with images [B, H, W, 3] uint8 (RGB) and their prompts; returns [B] float64 in [0, 1].

    Raises:
        ConfigError: RapidOCR is not installed.
        RewardError: when called: a prompt that quotes no text or one in letters that the reader does not know, or an
            image more than 8 times as long as wide.
    """

    def __init__(self) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError as error:
            raise ConfigError(
                f"reward.terms: ocr needs the extra: pip install 'star-kernels[ocr]' ({error})"
            ) from error
        # onnxruntime's own choice is as many as the machine has cores, in every process.
        threads = own_threads()
        self._read = RapidOCR() if threads is None else RapidOCR(intra_op_num_threads=threads)

    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        return np.array(
            [text_score(wanted(prompt.text), self.read(image)) for image, prompt in zip(images, prompts, strict=True)]
        )

    def read(self, image: np.ndarray) -> list[str]:
        """The lines of text in an image [H, W, 3] uint8 (RGB), from top to bottom."""
        height, width = image.shape[:2]
        if max(height, width) > _LONGEST * min(height, width):
            raise RewardError(f"reward ocr: expected sides of at most {_LONGEST} to 1, got {width} x {height} pixels")
        lines, _ = self._read(np.ascontiguousarray(image[:, :, ::-1]))  # OpenCV's order of channels.
        return [text for _, text, _ in lines or ()]


def text_score(texts: Sequence[str], lines: Sequence[str]) -> float:
    """1 - (edit distance from what was read to the wanted texts) / (their length), between 0 and 1.

    What the reader cannot tell apart does not count (`spellings`); the better of the two spellings does. A text that
    stands in what was read costs nothing, and neither does what stands around it. What is left over is compared with
    the texts that were not found, in the order that fits best; its distance is at most their length, so that any amount
    of other text costs no more than no text at all. For one text of ASCII characters this is the reward of Flow-GRPO.
    """
    wanted_spellings = zip(*map(spellings, texts), strict=True)
    return max(map(_score, wanted_spellings, spellings("".join(lines))))


def _score(targets: Sequence[str], read: str) -> float:
    missing = []
    # The longest first, so that "Go" does not take the letters out of "Go home".
    for index in sorted(range(len(targets)), key=lambda i: -len(targets[i])):
        if targets[index] in read:
            read = read.replace(targets[index], "", 1)
        else:
            missing.append(index)
    left = sum(len(targets[index]) for index in missing)
    if left == 0:
        return 1.0
    orders = permutations(missing) if len(missing) <= _MOST_ORDERS else [sorted(missing)]
    distance = min(Levenshtein.distance(read, "".join(targets[index] for index in order)) for order in orders)
    return 1.0 - min(distance, left) / sum(map(len, targets))
