"""Hostile and broken input: whatever comes in, the answer is an error that names it, and nothing is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from star_trainer.config import ConfigError, load_config

TENFOLD = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
MERGED = "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
YAML = {
    "code in a value": ("run:\n  folder: !!python/object/apply:os.getcwd []\n", "line 2"),
    "code in a key": ("!!python/name:os.getcwd x: 1\n", "line 1"),
    "a class of Python": ("run: !!python/object:star_trainer.config.Run {}\n", "line 1"),
    "a module of Python": ("method: !!python/module:os\n", "line 1"),
    "another tag": ("method: !secret x\n", "line 1"),
    "a list that grows tenfold with every line": (f"a0: &a0 [1]\n{TENFOLD}", "with all aliases expanded"),
    "a mapping that grows tenfold with every line": (f"a0: &a0 {{b: 1}}\n{MERGED}", "with all aliases expanded"),
    "a list inside itself": ("method: &a [*a]\n", "with all aliases expanded"),
    "a mapping inside itself": ("run: &a\n  folder: *a\n", "with all aliases expanded"),
    "a mapping merged into itself": ("run: &a\n  <<: *a\n", "with all aliases expanded"),
    "an alias of nothing": ("method: *star\n", "line 1"),
    "deep nesting": ("method: " + "[" * 50_000, "not valid YAML"),
    "deep nesting that ends": ("method: " + "[" * 40 + "]" * 40, "levels"),
    "a key twice": ("method: star\nrun:\n  seed: 1\n  seed: 2\n", "line 4: the key run.seed"),
    "a section twice": ("run:\n  seed: 1\nmethod: star\nrun:\n  seed: 2\n", "line 4: the key run"),
    "a list as key": ("? [a, b]\n: 1\n", "line 1"),
    "a mapping as key": ("run: {{seed: 1}: 2}\n", "line 1"),
    "a number as key": ("1: 2\n", "line 1: 1: Keys should be strings"),
    "no name as key": ("null: 2\n", "None"),
    "two documents": ("method: star\n---\nmethod: uniform\n", "not valid YAML"),
    "a tab": ("run:\n\tseed: 1\n", "line 2"),
    "an open quotation mark": ('method: "star\n', "not valid YAML"),
    "a null byte": ("method: st\0ar\n", "not valid YAML"),
    "half an emoji": ("method: \ud83d\n", "utf-8"),
    "a number of 5,000 digits": (f"run:\n  seed: {'9' * 5000}\n", "digits"),
    "a seed beyond 64 bits": (f"run:\n  seed: {10**30}\n", "line 2: run.seed"),
    "a date that does not exist": ("run:\n  seed: 2026-99-99\n", "not valid YAML"),
    "a date": ("run:\n  seed: 2026-01-01\n", "line 2: run.seed"),
    "truth for a number": ("train:\n  learning_rate: [true]\n", "line 2: train.learning_rate"),
    "a name of 10,000 characters": (f"method: {'x' * 10_000}\n", "line 1: method"),
    "a key of 10,000 characters": (f"{'x' * 1000}: 1\n", "unknown key"),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_is_refused_where_it_is_bad(kind: str, tmp_path: Path) -> None:
    text, message = YAML[kind]
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert message in str(caught.value) and "mine.yaml" in str(caught.value)
    assert len(str(caught.value)) < 2500 and "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize("value", ["!!python/name:os.getcwd", "&a [*a]", "[", "'", "\0", "2026-99-99"])
def test_a_bad_value_on_the_command_line_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.folder"):
        load_config("tiny", [f"run.folder={value}"])
