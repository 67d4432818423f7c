"""Settings from a preset or a YAML file, with ``key=value`` overrides; what is wrong is said with its line."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from star_trainer.config.errors import ConfigError
from star_trainer.config.settings import Config, Section
from star_trainer.config.yaml_files import KeyPath, YamlFileError, parse

PRESETS = Path(__file__).parent / "presets"

SectionType = TypeVar("SectionType", bound=Section)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read a preset by name or a YAML file by path, and apply overrides like ``train.learning_rate=1e-4``.

    Raises:
        ConfigError: no such preset or file, malformed YAML, an unknown key, a value of the wrong type or
            range, or settings that do not go together; the message names the key and the line of the file.
    """
    path = Path(source).expanduser()
    if source in preset_names():
        path = PRESETS / f"{source}.yaml"
    elif not path.is_file():
        hint = _did_you_mean(source, preset_names())
        raise ConfigError(f"{source}: neither a preset ({', '.join(preset_names())}) nor a file{hint}")
    tree, places = _read_tree(path, source)
    for override in overrides:
        _apply_override(tree, override, places)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, Config, source, places)) from error
    folder = config.run.folder
    for name, value in (("preset", path.stem), ("method", config.method), ("seed", str(config.run.seed))):
        folder = folder.replace(f"{{{name}}}", value)
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": folder})})


def read_section(section: type[SectionType], path: Path) -> SectionType:
    """A section that is a YAML file of its own.

    Raises:
        ConfigError: malformed YAML, an unknown key, or a value that cannot be used; the message names key and line.
    """
    tree, places = _read_tree(path, str(path))
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, section, str(path), places)) from error


def has_keys(path: Path, *keys: str) -> bool:
    """Whether a file is YAML with these keys at its top."""
    try:
        return path.is_file() and set(keys) <= set(_read_tree(path, str(path))[0])
    except ConfigError:
        return False


def _read_tree(path: Path, source: str) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """What a YAML file says, and where it says each key."""
    try:
        tree, lines = parse(path.read_text(encoding="utf-8"))
    except (YamlFileError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(tree).__name__}")
    return tree, {key: f"{source}, line {line}" for key, line in lines.items()}


def with_implied(saved: dict[str, Any]) -> dict[str, Any]:
    """The configuration that a run has saved, with what it implied where a setting did not exist yet.

    Such a setting had the effect of its default, but for these.
    """
    earlier: dict[str, dict[str, Any]] = {"train": {"betas": [0.9, 0.99], "granularity": None}}
    if "geneval_graded" in saved.get("reward", {}).get("terms", {}):
        earlier["reward"] = {"extra_objects": "ignored"}
    return saved | {name: section | saved.get(name, {}) for name, section in earlier.items()}


def check_section(
    section: type[SectionType], defaults: dict[str, Any], overrides: Sequence[str], name: str
) -> SectionType:
    """One section of the configuration from ``key=value`` overrides of `defaults`.

    Raises:
        ConfigError: an unknown key or a value of the wrong type or range; the message names the key.
    """
    tree = dict(defaults)
    for override in overrides:
        _apply_override(tree, override, {})
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, section, name, {})) from error


_SHORT_KEYS = {"train.lr": "train.learning_rate"}
_COMMAND_LINE = "command line"


def _apply_override(tree: dict[str, Any], override: str, places: dict[KeyPath, str]) -> None:
    """Put ``key=value`` into the tree, and where it comes from into `places`."""
    key, equals, text = override.partition("=")
    key = _SHORT_KEYS.get(key, key)
    if not equals or not key:
        raise ConfigError(f"{override}: expected an override like train.learning_rate=1e-4")
    keys = tuple(key.split("."))
    # A name such as my.package:function has dots that separate no keys.
    if keys[:2] in (("reward", "terms"), ("reward", "floors"), ("reward", "gates")) or keys[0] == "terms":
        depth = 1 if keys[0] == "terms" else 2
        keys = (*keys[:depth], ".".join(keys[depth:])) if len(keys) > depth else keys
    for parent in keys[:-1]:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    try:
        tree[keys[-1]] = parse(text)[0]
    except YamlFileError as error:
        raise ConfigError(f"{key}: the value {reprlib.repr(text)} is not valid YAML") from error
    for known in [known for known in places if known[: len(keys)] == keys]:
        del places[known]
    places[keys] = _COMMAND_LINE


def _explain(error: ValidationError, section: type[BaseModel], source: str, places: dict[KeyPath, str]) -> str:
    """What is wrong, problem by problem: where it stands, the key, and what was expected."""
    problems = []
    for problem in error.errors():
        location = tuple(str(part) for part in problem["loc"])
        key = ".".join(location)
        if problem["type"] == "extra_forbidden":
            text = f"{key}: unknown key{_did_you_mean_key(location, section)}"
        elif key:
            text = f"{key}: {problem['msg'].removeprefix('Value error, ')}, got {reprlib.repr(problem['input'])}"
        else:
            # From a check of several settings, which starts its message with the key.
            text = problem["msg"].removeprefix("Value error, ")
            location = tuple(text.partition(":")[0].split("."))
        problems.append(f"{_place(location, places) or source}: {text}")
    return "; ".join(problems)


def _place(location: KeyPath, places: dict[KeyPath, str]) -> str | None:
    """Where a setting was written: itself, what is inside it, or the section around it."""
    if location not in places:
        inside = [place for key, place in places.items() if key[: len(location)] == location]
        if inside:
            return inside[0]
    return next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), None)


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _did_you_mean_key(location: KeyPath, section: type[BaseModel]) -> str:
    """The key that was meant: one spelt alike in the same section, or one of the same name elsewhere."""
    key, name, prefix = ".".join(location), location[-1], "".join(f"{part}." for part in location[:-1])
    if key in _SHORT_KEYS:
        return f"; did you mean {_SHORT_KEYS[key]}?"
    known = sorted({".".join(parts[:n]) for parts in map(_parts, _keys(section)) for n in range(1, len(parts) + 1)})
    siblings = [entry[len(prefix) :] for entry in known if entry.startswith(prefix) and "." not in entry[len(prefix) :]]
    meant = [f"{prefix}{close}" for close in difflib.get_close_matches(name, siblings, n=1)]
    meant = meant or [f"{prefix}{sibling}" for sibling in siblings if name in sibling.split("_")]
    meant = meant or [entry for entry in known if entry.endswith(f".{name}")]
    return f"; did you mean {' or '.join(meant[:3])}?" if meant else ""


def _parts(key: str) -> list[str]:
    return key.split(".")


def _keys(section: type[BaseModel], prefix: str = "") -> dict[str, tuple[Any, str]]:
    """Every key of a section and those inside it, with its default and meaning, and the values that it may have."""
    keys: dict[str, tuple[Any, str]] = {}
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, Section):
            keys |= _keys(type(default), f"{prefix}{name}.")
        else:
            meaning, values = field.description or "", _values(field.annotation)
            if any(not re.search(rf"\b{value}\b", meaning) for value in values):
                meaning = f"{' | '.join(values)}; {meaning}".removesuffix("; ")
            keys[f"{prefix}{name}"] = (default, meaning)
    return keys


def _values(annotation: Any) -> list[str]:
    """The values of a `Literal`, also of one that may be None."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [str(value) for value in arguments]
    return [value for argument in arguments for value in _values(argument)]


def describe_keys() -> str:
    """Every key with its default and meaning, for the help text."""
    lines = []
    for key, (default, meaning) in _keys(Config).items():
        shown = "null" if default is None else default
        lines.append(f"  {f'{key}={shown}':<44} {meaning}".rstrip())
    return "\n".join(lines)
