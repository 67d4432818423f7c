"""Rewards of one's own: where they are found, how they are called, and what is said of those that do not work."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from star_trainer.config import ConfigError, Reward
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardError, check_reward, load_reward

IMAGES = np.zeros((3, 8, 8, 3), dtype=np.uint8)
PROMPTS = [Prompt(name, {"target": 0.5}) for name in "abc"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Writes a module into the current folder, which is not on the path, and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    names: list[str] = []

    def write(code: str) -> str:
        name = f"own_reward_{abs(hash(request.node.name)) % 10**9}_{len(names)}"
        (tmp_path / f"{name}.py").write_text("import numpy as np, torch\n" + textwrap.dedent(code))
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_a_module_of_the_current_folder_is_found_and_called_with_images_and_prompts(module) -> None:
    name = module(
        """
        def score(images, prompts):
            assert images.shape == (3, 8, 8, 3) and images.dtype == np.uint8
            return [len(prompt.text) * prompt.metadata["target"] for prompt in prompts]
        """
    )
    config = Reward(terms={f"{name}:score": 2.0})
    check_reward(config)
    assert load_reward(config)(IMAGES, PROMPTS).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "value",
    ["[1, 2.0, True]", "np.array([1, 2, 1], dtype=np.float16)", "torch.tensor([1.0, 2, 1], requires_grad=True)"]
    + ["torch.tensor([1, 2, 1]).bfloat16()", "(1, 2, 1)"],
)
def test_lists_arrays_and_tensors_are_taken(module, value: str) -> None:
    name = module(f"def score(images, prompts):\n    return {value}\n")
    assert load_reward(Reward(terms={f"{name}:score": 1.0}))(IMAGES, PROMPTS).tolist() == [1.0, 2.0, 1.0]


REFUSED = {
    "def score(images): ...": r"TypeError: expected function\(images, prompts\), got \(images\)",
    "def score(images, prompts, model): ...": r"TypeError: expected function\(images, prompts\).*model",
    "def score(): ...": "TypeError: expected function",
    "score = 3": "TypeError: score is a int, not a function",
    "def other(images, prompts): ...": "AttributeError.*score",
    "def score(images, prompts) ...": "SyntaxError",
    "import a_package_that_is_not_there": "ModuleNotFoundError.*a_package_that_is_not_there",
    "raise RuntimeError('no licence')": "RuntimeError: no licence",
}


@pytest.mark.parametrize("code", REFUSED)
def test_what_cannot_be_called_is_refused_before_anything_loads(module, code: str) -> None:
    name = module(code)
    for check in (check_reward, load_reward):
        with pytest.raises(ConfigError, match=rf"reward\.terms: '{name}:score' cannot be used: {REFUSED[code]}"):
            check(Reward(terms={f"{name}:score": 1.0}))


FAILING = {
    "None": "expected 3 values, got NoneType",
    "1.0": "expected 3 values, got float",
    "'abc'": "expected 3 numbers, got 'abc'",
    "['a', 'b', 'c']": "expected 3 numbers",
    "[1.0, None, 'x']": "expected 3 numbers",
    "[1.0, 2.0]": r"expected 3 values, got shape \[2\]",
    "[[1.0], [2.0], [3.0]]": r"expected 3 values, got shape \[3, 1\]",
    "[[1.0], [2.0, 3.0], []]": "expected 3 numbers",
    "{'a': 1.0}": "expected 3 numbers, got",
    "(x for x in range(3))": "expected 3 numbers, got <generator",
    "[1.0, float('nan'), 2.0]": "got NaN or infinity for sample 1",
    "torch.tensor([1.0, 2.0, float('inf')])": "got NaN or infinity for sample 2",
    "prompts[0].metadata['missing']": r"KeyError: 'missing' \(.*line 3\)",
    "images[7]": "IndexError",
}


@pytest.mark.parametrize("value", FAILING)
def test_what_a_reward_should_not_return_is_refused_by_its_name(module, value: str) -> None:
    name = module(f"def score(images, prompts):\n    return {value}\n")
    reward = load_reward(Reward(terms={f"{name}:score": 1.0}))
    with pytest.raises(RewardError, match=f"^reward {name}:score: {FAILING[value]}"):
        reward(IMAGES, PROMPTS)


def test_a_misspelt_name_is_answered_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"got 'geneval_grade'; did you mean geneval_graded\?"):
        check_reward(Reward(terms={"geneval_grade": 1.0}))
    with pytest.raises(ConfigError, match=r"got 'zzz'$"):
        check_reward(Reward(terms={"zzz": 1.0}))


def test_a_reward_server_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"reward\.remote\.url"):
        check_reward(Reward(terms={"remote": 1.0}))
