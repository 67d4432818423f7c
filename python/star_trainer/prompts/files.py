"""Where prompts come from: the scenes world, or a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from star_trainer.config import Config, ConfigError, Prompts
from star_trainer.rewards import check_prompts as check_rewarded
from star_trainer.scenes import ScenePrompt, sample_prompts

PromptSource = Callable[[np.random.Generator, int], list[ScenePrompt]]


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
    if len(held_out) < 2:
        raise ConfigError(f"prompts.held_out: {config.held_out} holds one prompt, and a comparison needs at least two")
    training = read_prompts(config.source, "prompts.source", config.origin)
    return _from_file(training, in_order=False), _from_file(held_out, in_order=True)


def check_prompts(config: Config) -> None:
    """Whether the prompts have beside them what the rewards and the method need.

    Raises:
        ConfigError: a file that cannot be read, prompts whose images a reward cannot tell apart, or a method with
            allocation maps where no prompt has units.
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
        if key == "prompts.source" and config.uses_maps and config.units.source == "file" and not _any_units(prompts):
            raise ConfigError(
                f"units.source: the method {config.method} needs text units, and none stand beside the prompts in "
                f"{name}; set units=rules to find them by rule"
            )


def _any_units(prompts: list[ScenePrompt]) -> bool:
    return any(prompt.units for prompt in prompts)


def read_prompts(name: str, key: str, origin: str | None = None) -> list[ScenePrompt]:
    """The prompts of a file, by the ending of its name.

    ``.txt``: one prompt per line, as in Flow-GRPO's datasets. ``.tsv``: tab-separated with a header, prompts in the
    column ``Prompt``, as in PartiPrompts. Anything else is JSON lines: objects with `prompt`, optionally `units` (a
    list of strings), and whatever else the reward reads as metadata, as in GenEval's files. Empty lines are skipped.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8 or malformed; the message names `key` and the line, or says
            that a missing file comes from `origin`.
    """
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"{key}: no such file: {path}{f' ({origin})' if origin else ''}")
    try:
        # Not str.splitlines, which also splits at characters that may stand inside a prompt.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {path} is not UTF-8: {error}") from error
    filled = [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    parsers: dict[str, Callable[[str], ScenePrompt | None]] = {".txt": _text_line, ".tsv": _Table()}
    parse = parsers.get(path.suffix, _json_line)
    prompts = []
    for number, line in filled:
        try:
            prompt = parse(line)
            if prompt is not None:
                _check_text(prompt.text)
        except ValueError as error:
            raise ConfigError(f"{key}: {path}, line {number}: {error}") from error
        if prompt is not None:
            prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{key}: {path} holds no prompts")
    return prompts


def _check_text(text: str) -> None:
    """Refuse what no tokenizer takes, or nothing can be drawn of."""
    if not text.strip():
        raise ValueError("expected a prompt, got white space")
    if "\0" in text:
        raise ValueError("expected a prompt without null bytes")
    # Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is a ValueError.
    text.encode()


def _text_line(line: str) -> ScenePrompt:
    return ScenePrompt(line.strip(), {})


class _Table:
    """Parses lines of a tab-separated table, of which the first names the columns."""

    def __init__(self) -> None:
        self.columns: list[str] = []

    def __call__(self, line: str) -> ScenePrompt | None:
        cells = line.split("\t")
        if not self.columns:
            self.columns = [cell.strip().lower() for cell in cells]
            if "prompt" not in self.columns:
                raise ValueError("expected a header line with a column 'Prompt'")
            return None
        if len(cells) <= self.columns.index("prompt"):
            raise ValueError(f"expected at least {self.columns.index('prompt') + 1} columns, got {len(cells)}")
        row = dict(zip(self.columns, cells, strict=False))
        return ScenePrompt(row["prompt"].strip(), row)


def _json_line(line: str) -> ScenePrompt:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError("expected an object with a string 'prompt'")
    units = entry.get("units", [])
    if not isinstance(units, list) or not all(isinstance(unit, str) for unit in units):
        raise ValueError("expected 'units' to be a list of strings")
    return ScenePrompt(entry["prompt"], entry, tuple(units))


def _from_file(prompts: list[ScenePrompt], *, in_order: bool) -> PromptSource:
    def draw(rng: np.random.Generator, count: int) -> list[ScenePrompt]:
        if in_order:
            return prompts[:count]
        # As many passes over the file as it takes, each in its own order: no prompt twice before all came once.
        passes = [rng.permutation(len(prompts)) for _ in range(-(-count // len(prompts)))]
        return [prompts[index] for index in np.concatenate(passes)[:count]]

    return draw
