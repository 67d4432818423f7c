"""Where prompts come from: the scenes world, or a file."""

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

    Files are read by `read_prompts`.

    Raises:
        ConfigError: a file that is missing, empty or malformed; the message names the line.
    """
    if config.source == "scenes":
        return partial(sample_prompts, held_out=False), partial(sample_prompts, held_out=True)
    assert config.held_out is not None, "checked by Config"
    held_out = read_prompts(config.held_out, "prompts.held_out")
    if len(held_out) < 2:
        raise ConfigError(f"prompts.held_out: {config.held_out} holds one prompt, and a comparison needs at least two")
    return _from_file(read_prompts(config.source, "prompts.source"), in_order=False), _from_file(
        held_out, in_order=True
    )


def read_prompts(name: str, key: str) -> list[ScenePrompt]:
    """The prompts of a file, by the ending of its name.

    ``.txt``: one prompt per line, as in Flow-GRPO's datasets. ``.tsv``: tab-separated with a header, prompts in the
    column ``Prompt``, as in PartiPrompts. Anything else is JSON lines: objects with `prompt`, optionally `units` (a
    list of strings), and whatever else the reward reads as metadata, as in GenEval's files. Empty lines are skipped.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8 or malformed; the message names `key` and the line.
    """
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"{key}: no such file: {path}")
    try:
        # Not str.splitlines, which also splits at characters that may stand inside a prompt.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {path} is not UTF-8: {error}") from error
    parse = {".txt": _text_line, ".tsv": _table_line(lines[0])}.get(path.suffix, _json_line)
    prompts = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r")
        if not line.strip() or (path.suffix == ".tsv" and number == 1):
            continue
        try:
            prompts.append(parse(line))
        except ValueError as error:
            raise ConfigError(f"{key}: {path}, line {number}: {error}") from error
    if not prompts:
        raise ConfigError(f"{key}: {path} holds no prompts")
    return prompts


def _text_line(line: str) -> ScenePrompt:
    return ScenePrompt(line.strip(), {})


def _table_line(header: str) -> Callable[[str], ScenePrompt]:
    columns = [column.strip().lower() for column in header.split("\t")]

    def parse(line: str) -> ScenePrompt:
        if "prompt" not in columns:
            raise ValueError("expected a header line with a column 'Prompt'")
        cells = line.split("\t")
        if len(cells) <= columns.index("prompt"):
            raise ValueError(f"expected at least {columns.index('prompt') + 1} columns, got {len(cells)}")
        row = dict(zip(columns, cells, strict=False))
        return ScenePrompt(row["prompt"].strip(), row)

    return parse


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
