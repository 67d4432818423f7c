"""Where prompts come from: the scenes world, or a JSON-lines file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from star_trainer.config import ConfigError, Prompts
from star_trainer.scenes import ScenePrompt, sample_prompts

PromptSource = Callable[[np.random.Generator, int], list[ScenePrompt]]


def load_prompts(config: Prompts) -> tuple[PromptSource, PromptSource]:
    """Sources of training prompts and of held-out prompts: (generator, count) -> prompts.

    A line of a file is an object with `prompt`, optionally `units` (a list of strings), and whatever else
    the reward reads as metadata, as in GenEval's files.

    Raises:
        ConfigError: a file that is missing, empty or malformed; the message names the line.
    """
    if config.source == "scenes":
        return partial(sample_prompts, held_out=False), partial(sample_prompts, held_out=True)
    assert config.held_out is not None, "checked by Config"
    held_out = _read(config.held_out, "prompts.held_out")
    if len(held_out) < 2:
        raise ConfigError(f"prompts.held_out: {config.held_out} holds one prompt, and a comparison needs at least two")
    return _from_file(_read(config.source, "prompts.source"), in_order=False), _from_file(held_out, in_order=True)


def _read(name: str, key: str) -> list[ScenePrompt]:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"{key}: no such file: {path}")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{key}: {path}, line {number}: not valid JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ConfigError(f"{key}: {path}, line {number}: expected an object with a string 'prompt'")
        units = entry.get("units", [])
        if not isinstance(units, list) or not all(isinstance(unit, str) for unit in units):
            raise ConfigError(f"{key}: {path}, line {number}: expected 'units' to be a list of strings")
        prompts.append(ScenePrompt(entry["prompt"], entry, tuple(units)))
    if not prompts:
        raise ConfigError(f"{key}: {path} holds no prompts")
    return prompts


def _from_file(prompts: list[ScenePrompt], *, in_order: bool) -> PromptSource:
    def draw(rng: np.random.Generator, count: int) -> list[ScenePrompt]:
        if in_order:
            return prompts[:count]
        # As many passes over the file as it takes, each in its own order: no prompt twice before all came once.
        passes = [rng.permutation(len(prompts)) for _ in range(-(-count // len(prompts)))]
        return [prompts[index] for index in np.concatenate(passes)[:count]]

    return draw
