"""What a run starts from, checked before any weights load: a backend that can run here, and prompts."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np
import torch

from star_kernels.backends import resolve_backend
from star_kernels.text_units import stands_in
from star_trainer.config import Config, ConfigError, Prompts
from star_trainer.prompts import Prompt, read_prompts
from star_trainer.rewards import check_prompts as check_rewarded
from star_trainer.run.files import file_digest
from star_trainer.worlds.scenes.captions import sample_prompts

PromptSource = Callable[[np.random.Generator, int], list[Prompt]]


def load_prompts(config: Prompts) -> tuple[PromptSource, PromptSource]:
    """Sources of training prompts and of held-out prompts: (generator, count) -> prompts.

    Files are read by `read_prompts`.

    Raises:
        ConfigError: a file that is missing, empty or malformed; the message names the line.
    """
    if config.source == "scenes":
        return partial(sample_prompts, held_out=False), partial(sample_prompts, held_out=True)
    assert config.held_out is not None, "checked by Config"
    held_out = read_prompts(config.held_out, "prompts.held_out", config.origin)
    if len({prompt.text for prompt in held_out}) < 2:
        raise ConfigError(f"prompts.held_out: {config.held_out} holds one prompt, and a comparison needs at least two")
    training = read_prompts(config.source, "prompts.source", config.origin)
    return _from_file(training, in_order=False), _from_file(held_out, in_order=True)


def prompt_digests(config: Prompts) -> dict[str, str]:
    """The SHA-256 of the file that training prompts are read from, by its setting; empty where there is none."""
    path = Path(config.source)
    return {"prompts.source": file_digest(path)} if path.is_file() else {}


def check_prompts(config: Config) -> None:
    """Whether the prompts have beside them what the rewards and the method need.

    Raises:
        ConfigError: a file that cannot be read, prompts whose images a reward cannot tell apart, or a method with
            allocation maps where no prompt has a unit that stands in it.
    """
    files = {"prompts.source": config.prompts.source, "prompts.held_out": config.prompts.held_out}
    if config.prompts.source == "scenes":
        scenes = sample_prompts(np.random.default_rng(0), 1, held_out=False)
        check_rewarded(config.reward.terms, scenes, "prompts.source: scenes")
        return
    for key, name in files.items():
        assert name is not None, "checked by Config"
        prompts = read_prompts(name, key, config.prompts.origin)
        check_rewarded(config.reward.terms, prompts, f"{key}: {name}")
        if key == "prompts.source" and config.uses_maps and config.units.source == "file":
            _check_units(prompts, config.method, name)


def _check_units(prompts: list[Prompt], method: str, name: str) -> None:
    """Refuse prompts that would all get uniform maps."""
    if not any(prompt.units for prompt in prompts):
        raise ConfigError(
            f"units.source: the method {method} needs text units, and none stand beside the prompts in {name}; set "
            "units=rules to find them by rule"
        )
    if not any(stands_in(prompt.text, unit) for prompt in prompts for unit in prompt.units):
        text, unit = next((prompt.text, unit) for prompt in prompts for unit in prompt.units)
        raise ConfigError(
            f"units.source: the method {method} needs text units, and of those beside the prompts in {name} none "
            f"stands in its prompt, letter by letter as words of their own, such as {unit!r} in {reprlib.repr(text)}"
        )


def units_not_found(config: Config) -> str | None:
    """A line about units that stand beside the training prompts but not in them, which count for nothing; or None."""
    if not config.uses_maps or config.units.source != "file" or config.prompts.source == "scenes":
        return None
    prompts = read_prompts(config.prompts.source, "prompts.source")
    foreign = [(unit, prompt.text) for prompt in prompts for unit in prompt.units if not stands_in(prompt.text, unit)]
    if not foreign:
        return None
    unit, text = foreign[0]
    return (
        f"{len(foreign):,} of {sum(len(prompt.units) for prompt in prompts):,} text units do not stand in their prompt "
        f"as words of their own and count for nothing, such as {unit!r} in {reprlib.repr(text)}; star-units lists them"
    )


def _from_file(prompts: list[Prompt], *, in_order: bool) -> PromptSource:
    def draw(rng: np.random.Generator, count: int) -> list[Prompt]:
        if in_order:
            return prompts[:count]
        # As many passes over the file as it takes, each in its own order: no prompt twice before all came once.
        passes = [rng.permutation(len(prompts)) for _ in range(-(-count // len(prompts)))]
        return [prompts[index] for index in np.concatenate(passes)[:count]]

    return draw


def check_trackers(names: Collection[str]) -> None:
    """Refuse trackers that accelerate does not know, or whose package is missing here.

    Raises:
        ConfigError: with the name.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    known, here = sorted(LOGGER_TYPE_TO_CLASS), [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise ConfigError(f"run.trackers: expected some of {', '.join(known)}, got {name!r}")
        # One that was registered with accelerate by hand is there.
        if name not in here and name in LoggerType.list():
            raise ConfigError(f"run.trackers: the package of {name} is not installed")


def check_backend(name: str) -> None:
    """Refuse a backend that cannot run here before anything else is done.

    Raises:
        ConfigError: with the reason.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolve_backend("the training", name, device, kernels=("triton", "cpu"))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(str(error)) from error
