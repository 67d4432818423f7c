"""Rewards by name: functions from images and prompts to numbers, and their weighted sum."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from star_trainer.config import ConfigError
from star_trainer.rewards.errors import RewardError
from star_trainer.rewards.requirements import judge
from star_trainer.rewards.scene_detector import detect
from star_trainer.scenes import ScenePrompt

RewardFunction = Callable[[np.ndarray, Sequence[ScenePrompt]], np.ndarray]


def scene_strict(images: np.ndarray, prompts: Sequence[ScenePrompt]) -> np.ndarray:
    """1 where an image meets every requirement of its prompt, else 0. Images [B, H, W, 3] uint8; returns [B]."""
    return np.array([judge(detect(i), p.metadata).strict for i, p in zip(images, prompts, strict=True)])


def scene_graded(images: np.ndarray, prompts: Sequence[ScenePrompt]) -> np.ndarray:
    """The fraction of its prompt's requirements that an image meets. Images [B, H, W, 3] uint8; returns [B]."""
    return np.array([judge(detect(i), p.metadata).graded for i, p in zip(images, prompts, strict=True)])


def _ocr() -> RewardFunction:
    # Not at the top, nor are others below: they need packages and models that most runs do without.
    from star_trainer.rewards.ocr import OcrReward

    return OcrReward()


_BY_NAME: dict[str, Callable[[], RewardFunction]] = {
    "scene_strict": lambda: scene_strict,
    "scene_graded": lambda: scene_graded,
    "ocr": _ocr,
}


def load_reward(terms: Mapping[str, float]) -> RewardFunction:
    """The weighted sum of rewards given by name or as ``module:function``.

    A reward is called with images [B, H, W, 3] uint8 and their B prompts and returns B finite numbers.

    Raises:
        ConfigError: a name that is not known, or a module or function that cannot be imported.
        RewardError: when called: a reward that returns the wrong number of values, or NaN or infinity.
    """
    functions = {name: _find(name) for name in terms}

    def reward(images: np.ndarray, prompts: Sequence[ScenePrompt]) -> np.ndarray:
        total = np.zeros(len(prompts))
        for name, function in functions.items():
            values = np.asarray(function(images, prompts), dtype=np.float64)
            if values.shape != (len(prompts),):
                raise RewardError(f"reward {name}: expected {len(prompts)} values, got shape {list(values.shape)}")
            if not np.isfinite(values).all():
                raise RewardError(
                    f"reward {name}: got NaN or infinity for sample {int(np.argmin(np.isfinite(values)))}"
                )
            total += terms[name] * values
        return total

    return reward


def _find(name: str) -> RewardFunction:
    if name in _BY_NAME:
        return _BY_NAME[name]()
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"reward.terms: expected one of {', '.join(_BY_NAME)} or module:function, got {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward.terms: {name!r} cannot be imported: {error}") from error
