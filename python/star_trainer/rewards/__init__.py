"""Rewards by name: functions from images and prompts to numbers, and their weighted sum."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from star_trainer.config import ConfigError, Reward
from star_trainer.rewards.errors import RewardError
from star_trainer.rewards.requirements import judge
from star_trainer.rewards.scene_detector import detect
from star_trainer.scenes import ScenePrompt

if TYPE_CHECKING:
    from star_trainer.rewards.clip import ClipModel
    from star_trainer.rewards.geneval import Detector

RewardFunction = Callable[[np.ndarray, Sequence[ScenePrompt]], np.ndarray]


def scene_strict(images: np.ndarray, prompts: Sequence[ScenePrompt]) -> np.ndarray:
    """1 where an image meets every requirement of its prompt, else 0. Images [B, H, W, 3] uint8; returns [B]."""
    return np.array([judge(detect(i), p.metadata).strict for i, p in zip(images, prompts, strict=True)])


def scene_graded(images: np.ndarray, prompts: Sequence[ScenePrompt]) -> np.ndarray:
    """The fraction of its prompt's requirements that an image meets. Images [B, H, W, 3] uint8; returns [B]."""
    return np.array([judge(detect(i), p.metadata).graded for i, p in zip(images, prompts, strict=True)])


class _Models:
    """The models of the rewards, each loaded when it is first asked for and then shared.

    Imports are made here, not at the top: they need packages that most runs do without.
    """

    def __init__(self, config: Reward) -> None:
        self.names = config.models
        self.server = config.remote

    @cached_property
    def clip(self) -> ClipModel:
        from star_trainer.rewards.clip import ClipModel

        return ClipModel(self.names.clip, key="reward.models.clip")

    @cached_property
    def detector(self) -> Detector:
        from star_trainer.rewards.geneval import Detector

        return Detector(self.names.detector, self.clip)

    def geneval(self, *, strict: bool) -> RewardFunction:
        from star_trainer.rewards.geneval import GenEvalReward

        return GenEvalReward(self.detector, strict=strict)

    def clip_score(self) -> RewardFunction:
        from star_trainer.rewards.clip import ClipReward

        return ClipReward(self.clip, scale="percent")

    def pickscore(self) -> RewardFunction:
        from star_trainer.rewards.clip import ClipModel, ClipReward

        model = ClipModel(self.names.pickscore, self.names.pickscore_processor, key="reward.models.pickscore")
        return ClipReward(model, scale="logit")

    def remote(self) -> RewardFunction:
        from star_trainer.rewards.remote import RemoteRewardClient

        return RemoteRewardClient(self.server)

    def ocr(self) -> RewardFunction:
        from star_trainer.rewards.ocr import OcrReward

        return OcrReward()


_BY_NAME: dict[str, Callable[[_Models], RewardFunction]] = {
    "scene_strict": lambda models: scene_strict,
    "scene_graded": lambda models: scene_graded,
    "geneval_strict": lambda models: models.geneval(strict=True),
    "geneval_graded": lambda models: models.geneval(strict=False),
    "ocr": _Models.ocr,
    "pickscore": _Models.pickscore,
    "clip_score": _Models.clip_score,
    "remote": _Models.remote,
}


def load_reward(config: Reward) -> RewardFunction:
    """The weighted sum of rewards given by name or as ``module:function``.

    A reward is called with images [B, H, W, 3] uint8 and their B prompts and returns B finite numbers.

    Raises:
        ConfigError: a name that is not known, or a model, module or function that cannot be loaded.
        RewardError: when called: a reward that returns the wrong number of values, or NaN or infinity.
    """
    models = _Models(config)
    functions = {name: _find(name, models) for name in config.terms}

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
            total += config.terms[name] * values
        return total

    return reward


def _find(name: str, models: _Models) -> RewardFunction:
    if name in _BY_NAME:
        return _BY_NAME[name](models)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"reward.terms: expected one of {', '.join(_BY_NAME)} or module:function, got {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reward.terms: {name!r} cannot be imported: {error}") from error
