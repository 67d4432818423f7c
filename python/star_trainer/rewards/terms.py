"""Rewards by name: functions from images and prompts to numbers, and their weighted sum."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from star_trainer.config import Config, ConfigError, Reward
from star_trainer.families.devices import use_own_device
from star_trainer.prompts import Prompt
from star_trainer.rewards.combine import weighted, weighted_sum
from star_trainer.rewards.deadline import call_within
from star_trainer.rewards.errors import RewardError
from star_trainer.rewards.geneval_classes import CLASSES, COLOURS
from star_trainer.rewards.named import BY_NAME, CONVERTED, DIFFERENTIABLE, Models, RewardFunction
from star_trainer.rewards.scenes import scene_graded, scene_strict
from star_trainer.rewards.spelling import wanted
from star_trainer.worlds.requirements import check_requirements

HeldOutScorer = Callable[[np.ndarray, Sequence[Prompt]], dict[str, np.ndarray]]
DifferentiableReward = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]


# GenEval's own measure.
GENEVAL = "geneval_strict"
# What judges requirements, and so can tell nothing of a prompt without any.
_OF_REQUIREMENTS = ("scene_strict", "scene_graded", "geneval_flow_grpo", "geneval_graded", "geneval_strict")


def load_reward(config: Reward) -> RewardFunction:
    """The weighted sum of `load_terms`.

    A reward is called as ``function(images, prompts)`` with images [B, H, W, 3] uint8 (RGB) and a sequence of B
    `Prompt`, whose `text` is the prompt and whose `metadata` is what stands beside it in its file. It returns B
    finite numbers, more being better: a list, an array or a tensor. A module is looked for in the current folder first.

    Raises:
        ConfigError: what `check_reward` refuses, or a model that cannot be loaded.
        RewardError: when called: images of another form, a reward of one's own that fails, anything but B finite
            numbers, or a prompt that the reward can tell nothing of; the message names the term.
    """
    return weighted_sum(config, load_terms(config))


def held_out_terms(config: Reward) -> list[str]:
    """The terms that held-out images are scored by: those that are trained on, and GenEval's own measure where one
    of them is made from it.
    """
    names = list(config.terms)
    if any(name.startswith("geneval_") for name in names) and GENEVAL not in names:
        names.append(GENEVAL)
    return names


def held_out_scorer(config: Config, terms: Mapping[str, RewardFunction]) -> HeldOutScorer:
    """What held-out images are scored by: a function of images and prompts that gives scores [B] by name.

    In the scenes world they are whether (``strict``) and how far (``graded``) images meet their prompts; then what is
    trained on (``reward``), unless it is one of these two; and each of several `terms`, those of `held_out_terms`, by
    itself. GenEval's own is always there under its name.
    """
    weights = config.reward.terms

    def score(images: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        scores: dict[str, np.ndarray] = {}
        if config.prompts.source == "scenes":
            scores = {"strict": scene_strict(images, prompts), "graded": scene_graded(images, prompts)}
            if list(weights) in (["scene_strict"], ["scene_graded"]):
                return scores
        values = {name: term(images, prompts) for name, term in terms.items()}
        scores["reward"] = weighted(config.reward, values)
        return scores | values if len(terms) > 1 or GENEVAL in terms else scores

    return score


def load_terms(
    config: Reward, names: Collection[str] | None = None, models: Models | None = None
) -> dict[str, RewardFunction]:
    """The rewards given by name or as ``module:function``, without their weights; models are shared among them.

    `names` takes the place of the terms of the configuration; `models` are those of it that others share, too.
    From here on ``cuda`` is this process's GPU in the calling thread.

    Raises:
        ConfigError, RewardError: as of `load_reward`.
    """
    use_own_device()
    models = models or Models(config)
    chosen = config.terms if names is None else names
    return {name: _checked(name, _find(name, models), config.timeout) for name in chosen}


def _checked(name: str, function: RewardFunction, timeout: float) -> RewardFunction:
    """A reward that refuses bad images and prompts it can tell nothing of, and returns finite numbers [B] float64.

    One that has not returned after `timeout` seconds is given up.
    """

    def call(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        _check_images(images, len(prompts))
        for prompt in prompts:
            if (reason := unsuitable(name, prompt)) is not None:
                raise RewardError(f"reward {name}: {reason}")
        try:
            values = call_within(timeout, function, images, prompts)
        except TimeoutError as error:
            raise RewardError(f"reward {name}: {error} (reward.timeout)") from error
        return _values(name, values, len(prompts))

    return _as_differentiable(function, call)


def _as_differentiable(function: RewardFunction, wrapped: RewardFunction) -> RewardFunction:
    """`wrapped` with the gradient that `function` has, if any."""
    if callable(found := getattr(function, "differentiable", None)):
        wrapped.differentiable = found  # type: ignore[attr-defined]
    return wrapped


def check_reward(config: Reward) -> None:
    """Whether the terms can be had, as far as that can be told without loading a model.

    Raises:
        ConfigError: a name that is not known, a module or function that cannot be imported or called with images and
            prompts, a package that is missing, no converted checkpoint, or no address of a reward server.
    """
    for name in config.terms:
        if name in ("remote", "vlm_judge"):
            BY_NAME[name](Models(config))
        elif name in CONVERTED:
            Models(config).converted(name)
        elif name == "ocr" and importlib.util.find_spec("rapidocr_onnxruntime") is None:
            raise ConfigError("reward.terms: ocr needs the extra: pip install 'star-kernels[ocr]'")
        elif name not in BY_NAME:
            _import(name)


def unsuitable(name: str, prompt: Prompt) -> str | None:
    """Why a reward can tell nothing of the images of a prompt, or None if it can."""
    shown = reprlib.repr(prompt.text)
    if name in _OF_REQUIREMENTS:
        seen = (CLASSES, COLOURS) if name.startswith("geneval") else ()
        try:
            check_requirements(prompt.metadata, *seen)
        except ValueError as error:
            return f"the prompt {shown} has no usable requirements in its metadata: {error}"
        if name == "geneval_flow_grpo" and not prompt.metadata.get("include"):
            return f"expected 'include' in the metadata, 'exclude' alone is not scored, got none for {shown}"
    if name == "ocr":
        try:
            wanted(prompt.text)
        except RewardError as error:
            return str(error)
    return None


def _check_images(images: np.ndarray, count: int) -> None:
    fits = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4 and images.size > 0
    if not fits or len(images) != count or images.shape[3] != 3:
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise RewardError(f"rewards: expected images [{count}, H, W, 3] of uint8, got {got}")


def _values(name: str, values: Any, count: int) -> np.ndarray:
    """What a reward returned, as `count` finite numbers.

    Raises:
        RewardError: it is anything else.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name}: expected {count} numbers, got {reprlib.repr(values)}") from error
    if numbers.shape != (count,):
        got = f"shape {list(numbers.shape)}" if numbers.shape else type(values).__name__
        raise RewardError(f"reward {name}: expected {count} values, got {got}")
    if not np.isfinite(numbers).all():
        raise RewardError(f"reward {name}: got NaN or infinity for sample {int(np.argmin(np.isfinite(numbers)))}")
    return numbers


class NotDifferentiable(ConfigError):
    """A reward without a gradient with respect to the image."""


# Why no gradient reaches the image.
_WITHOUT_GRADIENT = {
    **dict.fromkeys(_OF_REQUIREMENTS, "it counts what a detector finds"),
    "ocr": "it compares texts that are read off the image",
    "remote": "a server returns numbers alone",
    "vlm_judge": "an endpoint returns numbers alone",
}


def differentiable_terms(terms: Mapping[str, RewardFunction]) -> dict[str, DifferentiableReward]:
    """The gradient's side of terms from `load_terms`.

    Such a reward is called as ``function(images, texts)`` with images [B, 3, H, W] in [0, 1] and B prompts' texts, and
    returns [B] with a gradient with respect to the images. A reward of one's own has it as an attribute
    ``differentiable``.

    Raises:
        NotDifferentiable: a term has none; the message says why.
    """
    return {name: _differentiable(name, term) for name, term in terms.items()}


def check_differentiable(config: Reward) -> None:
    """Refuse terms without a gradient, as far as that can be told without loading a model.

    Raises:
        ConfigError: what `check_reward` refuses.
        NotDifferentiable: a term has no gradient; the message says why.
    """
    check_reward(config)
    for name in config.terms:
        if name not in DIFFERENTIABLE:
            _differentiable(name, None if name in BY_NAME else _import(name))


def _differentiable(name: str, function: RewardFunction | None) -> DifferentiableReward:
    found = getattr(function, "differentiable", None)
    if not callable(found):
        reason = _WITHOUT_GRADIENT.get(name, "it has no attribute 'differentiable', a function of images and texts")
        raise NotDifferentiable(f"reward.terms: {name} has no gradient with respect to the image: {reason}")
    return found


def _find(name: str, models: Models) -> RewardFunction:
    return BY_NAME[name](models) if name in BY_NAME else _guarded(name, _import(name))


def _guarded(name: str, function: RewardFunction) -> RewardFunction:
    """A reward of one's own whose failure is a `RewardError`, so that it ends the run with a checkpoint."""

    def call(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        try:
            return function(images, prompts)
        except RewardError:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename}, line {last.lineno}"
            raise RewardError(f"reward {name}: {type(error).__name__}: {error} ({where})") from error

    return _as_differentiable(function, call)


def _import(name: str) -> RewardFunction:
    """The function that ``module:function`` names.

    Raises:
        ConfigError: there is none, or it cannot be called with images and prompts.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, BY_NAME, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"reward.terms: expected one of {', '.join(BY_NAME)} or module:function, got {name!r}{hint}")
    # As `python -m` does; a command has the folder of its script there.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # Some load a model as they are imported.
    use_own_device()
    try:
        function = getattr(importlib.import_module(module), attribute)
        if not callable(function):
            raise TypeError(f"{attribute} is a {type(function).__name__}, not a function")
        _check_signature(function)
    except Exception as error:
        # Whatever the import of somebody's module raises.
        raise ConfigError(f"reward.terms: {name!r} cannot be used: {type(error).__name__}: {error}") from error
    return function


def _check_signature(function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        # Some built-in functions have none that can be read.
        return
    try:
        signature.bind("images", "prompts")
    except TypeError as error:
        raise TypeError(f"expected function(images, prompts), got {signature}: {error}") from error


def check_prompts(terms: Collection[str], prompts: Sequence[Prompt], where: str) -> None:
    """Refuse prompts whose images the terms would all reward alike.

    Raises:
        ConfigError: starting with `where`; names the term, the first such prompt and how many there are.
    """
    for name in terms:
        reasons = [reason for prompt in prompts if (reason := unsuitable(name, prompt)) is not None]
        if reasons:
            raise ConfigError(
                f"{where}: {len(reasons)} of {len(prompts)} prompts do not suit the reward {name}: {reasons[0]}"
            )
