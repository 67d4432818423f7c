"""The rewards that come with the trainer, by name, and the models that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from star_trainer.config import ConfigError, Reward
from star_trainer.config.paths import folder_or_name
from star_trainer.prompts import Prompt
from star_trainer.rewards.scenes import scene_graded, scene_strict
from star_trainer.worlds.requirements import flow_grpo_score, judge

if TYPE_CHECKING:
    from star_trainer.rewards.diversity import Diversity
    from star_trainer.rewards.geneval import Detector
    from star_trainer.rewards.models.clip import ClipModel, ClipReward
    from star_trainer.rewards.models.heads import AestheticReward
    from star_trainer.rewards.models.image_reward import ImageReward
    from star_trainer.rewards.models.qwen_vl import QwenVLReward

RewardFunction = Callable[[np.ndarray, Sequence[Prompt]], np.ndarray]
# What has a gradient with respect to the image.
DIFFERENTIABLE = ("clip_score", "pickscore", "hps", "hps3", "image_reward", "aesthetic")
# What is read from a folder that star-convert-reward has written.
CONVERTED = ("hps", "hps3", "image_reward", "aesthetic")


class Models:
    """The models of the rewards, each loaded when it is first asked for and then shared.

    Imports are made here, not at the top: they need packages that most runs do without.
    """

    def __init__(self, config: Reward) -> None:
        self.names = config.models
        self.dtype = getattr(torch, config.dtype)
        self._clips: dict[str, ClipModel] = {}
        self.server, self.judge = config.remote, config.judge
        self.punish_extras = config.extra_objects == "punished"

    def _clip(self, setting: str) -> ClipModel:
        from star_trainer.rewards.models.clip import ClipModel

        name = getattr(self.names, setting)
        if name not in self._clips:
            self._clips[name] = ClipModel(name, key=f"reward.models.{setting}", dtype=self.dtype)
        return self._clips[name]

    @property
    def clip(self) -> ClipModel:
        return self._clip("clip")

    def converted(self, name: str) -> str:
        """The setting for what `star-convert-reward` has written for a reward.

        Raises:
            ConfigError: there is none.
        """
        folder = getattr(self.names, name)
        if folder is None:
            raise ConfigError(f"reward.models.{name}: expected {_converted_by(name)}, where reward.terms has {name}")
        return folder

    def _written(self, name: str) -> str:
        """The same, where it is there or may be on a model hub."""
        folder = self.converted(name)
        try:
            return folder_or_name(folder, f"reward.models.{name}")
        except ConfigError as error:
            raise ConfigError(f"{error}; expected {_converted_by(name)}") from error

    @cached_property
    def detector(self) -> Detector:
        from star_trainer.rewards.geneval import Detector

        return Detector(self.names.detector, self.clip)

    def geneval(self, score: Callable[..., float]) -> RewardFunction:
        from star_trainer.rewards.geneval import GenEvalReward

        return GenEvalReward(self.detector, score)

    def geneval_graded(self) -> RewardFunction:
        return self.geneval(lambda found, metadata: judge(found, metadata, punish_extras=self.punish_extras).graded)

    def clip_score(self) -> ClipReward:
        from star_trainer.rewards.models.clip import ClipReward

        return ClipReward(self.clip, scale="percent")

    def pickscore(self) -> ClipReward:
        from star_trainer.rewards.models.clip import ClipModel, ClipReward

        names, key = self.names, "reward.models.pickscore"
        model = ClipModel(names.pickscore, names.pickscore_processor, key=key, dtype=self.dtype)
        return ClipReward(model, scale="logit")

    def hps(self) -> ClipReward:
        from star_trainer.rewards.models.clip import ClipModel, ClipReward

        # The published code resizes numbers, not bytes.
        model = ClipModel(self._written("hps"), key="reward.models.hps", dtype=self.dtype, rounding=False)
        return ClipReward(model, scale="cosine")

    def image_reward(self) -> ImageReward:
        from star_trainer.rewards.models.image_reward import ImageReward

        return ImageReward(self._written("image_reward"), dtype=self.dtype)

    def aesthetic(self) -> AestheticReward:
        from star_trainer.rewards.models.heads import AestheticReward

        return AestheticReward(self._clip("aesthetic_clip"), self._written("aesthetic"))

    def hps3(self) -> QwenVLReward:
        from star_trainer.rewards.models.qwen_vl import QwenVLReward

        return QwenVLReward(self._written("hps3"), dtype=self.dtype)

    def vlm_judge(self) -> RewardFunction:
        from star_trainer.rewards.judge import VlmJudge

        return VlmJudge(self.judge)

    def diversity(self) -> Diversity:
        from star_trainer.rewards.diversity import ClipDiversity

        return ClipDiversity(self.clip)

    def remote(self) -> RewardFunction:
        from star_trainer.rewards.remote import RemoteRewardClient

        return RemoteRewardClient(self.server)

    def ocr(self) -> RewardFunction:
        from star_trainer.rewards.ocr import OcrReward

        return OcrReward()


def _converted_by(name: str) -> str:
    return f"the folder that `star-convert-reward {name}` has written from the published file"


BY_NAME: dict[str, Callable[[Models], RewardFunction]] = {
    "scene_strict": lambda models: scene_strict,
    "scene_graded": lambda models: scene_graded,
    "geneval_flow_grpo": lambda models: models.geneval(flow_grpo_score),
    "geneval_graded": Models.geneval_graded,
    "geneval_strict": lambda models: models.geneval(lambda found, metadata: judge(found, metadata).strict),
    "ocr": Models.ocr,
    "pickscore": Models.pickscore,
    "clip_score": Models.clip_score,
    "hps": Models.hps,
    "hps3": Models.hps3,
    "image_reward": Models.image_reward,
    "aesthetic": Models.aesthetic,
    "remote": Models.remote,
    "vlm_judge": Models.vlm_judge,
}
