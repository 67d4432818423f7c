"""The C++ kernel of attention_mass, with each instruction set that this CPU has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from star_kernels.attention import cpu
from tests.attention.test_attention_mass import MASS_ERROR, TEXT, definition, relative_error, sequence, sides
from tests.attention.test_joint_attention_cpu import DIRECTIONS, DTYPES
from tests.attention.test_joint_attention_cpu import level as level

SHAPES: dict[str, tuple[int, int, dict[str, int]]] = {
    "one token each": (1, 1, {}),
    "one text token": (300, 1, {"units": 2}),
    "much text": (5, 300, {"units": 16}),
    "whole blocks": (192, 256, {"units": 16}),
    "SD3.5 at 512 px": (1024, 205, {"batch": 1, "heads": 1, "dim": 64, "units": 8}),
    "17 units": (70, 40, {"units": 17}),
    "40 units": (97, 270, {"units": 40}),
    "D 1": (40, 9, {"dim": 1}),
    "D 7": (40, 9, {"dim": 7}),
    "D 160": (50, 47, {"dim": 160}),
}


def run(direction: str, *tensors: Tensor, **options: Any) -> Tensor:
    scale = tensors[0].shape[-1] ** -0.5
    return cpu.attention_mass(*tensors, **{"scale": scale, "text_lengths": None, "direction": direction, **options})


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_awkward_shapes_agree_with_the_softmax_in_float64(
    level: str, shape: str, dtype: torch.dtype, direction: str
) -> None:
    image, text, options = SHAPES[shape]
    query, key, unit_weights = sequence(image, text, dtype=dtype, **options)
    queries, keys, log_sum_exp = sides(query, key, direction, image)
    expected = definition(query, key, unit_weights, direction, image)
    assert relative_error(run(direction, queries, keys, unit_weights, log_sum_exp), expected) < MASS_ERROR[dtype]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_text_token_of_no_unit_is_not_read(level: str, dtype: torch.dtype, direction: str) -> None:
    query, key, unit_weights = sequence(90, 290, dtype=dtype)
    marked = torch.tensor([3, 4, 5, 17, 280])
    queries, keys, log_sum_exp = (t.clone() for t in sides(query, key, direction, 90))
    sparse = torch.zeros_like(unit_weights)
    sparse[:, marked] = unit_weights[:, marked]
    expected = run(direction, queries, keys, sparse, log_sum_exp)
    assert relative_error(expected, definition(query, key, sparse, direction, 90)) < MASS_ERROR[dtype]
    of_text = (keys,) if direction == "image_to_text" else (queries, log_sum_exp)
    for tensor in of_text:
        unmarked = torch.ones(290, dtype=torch.bool).index_fill(0, marked, False)
        tensor[:, :, unmarked] = float("nan")
    assert torch.equal(run(direction, queries, keys, sparse, log_sum_exp), expected)
    assert run(direction, queries, keys, torch.zeros_like(sparse), log_sum_exp).count_nonzero() == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_threads_and_repetition_change_no_bit(level: str, dtype: torch.dtype, direction: str) -> None:
    query, key, unit_weights = sequence(290, 37, batch=4, units=5, dtype=dtype)
    queries, keys, log_sum_exp = sides(query, key, direction, 290)
    tensors = queries, keys, unit_weights, log_sum_exp
    text_lengths = torch.tensor([37, 12, 0, 36])
    mass = run(direction, *tensors, text_lengths=text_lengths)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(run(direction, *tensors, text_lengths=text_lengths), mass)
            for b in range(4):
                alone = run(direction, *(t[b : b + 1] for t in tensors), text_lengths=text_lengths[b : b + 1])
                assert torch.equal(alone[0], mass[b])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_unit_weights_of_any_dtype(level: str, direction: str) -> None:
    query, key, unit_weights = sequence()
    queries, keys, log_sum_exp = sides(query, key, direction)
    for dtype in (*DTYPES, torch.float64):
        weights = unit_weights.to(dtype)
        expected = run(direction, queries, keys, weights.float(), log_sum_exp)
        assert torch.equal(run(direction, queries, keys, weights, log_sum_exp), expected)


def test_the_compiled_operator_checks_what_it_is_given() -> None:
    query, key, unit_weights = sequence()
    queries, keys, log_sum_exp = sides(query, key, "image_to_text")
    good = {"query": queries, "key": keys, "unit_weights": unit_weights, "log_sum_exp": log_sum_exp}
    for name, changed in [
        ("query", queries[0]),
        ("query", queries.double()),
        ("key", keys.bfloat16()),
        ("key", keys[:, :1]),
        ("key", keys[:, :, :0]),
        ("unit_weights", unit_weights[:, 1:]),
        ("unit_weights", unit_weights[..., :0]),
        ("log_sum_exp", log_sum_exp.double()),
        ("log_sum_exp", log_sum_exp[..., None]),
        ("log_sum_exp", log_sum_exp[:, :, 1:]),
    ]:
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            run("image_to_text", *{**good, name: changed}.values())
    for lengths in (torch.tensor([1]), torch.tensor([TEXT + 1, 3]), torch.tensor([-1, 3]), torch.tensor([1.0, 3.0])):
        with pytest.raises((ValueError, TypeError), match="^text_lengths: expected"):
            run("image_to_text", *good.values(), text_lengths=lengths)
