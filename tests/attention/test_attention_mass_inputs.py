"""Every bad input of attention_mass raises an error that names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from star_kernels import attention_mass

ROWS, HEADS, IMAGE, TEXT, DIM, UNITS = 2, 3, 10, 5, 8, 4
Change = Callable[[dict[str, Any]], dict[str, Any]]


def arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "query": torch.randn(ROWS, HEADS, IMAGE, DIM, generator=generator),
        "key": torch.randn(ROWS, HEADS, TEXT, DIM, generator=generator),
        "unit_weights": torch.ones(ROWS, TEXT, UNITS),
        "log_sum_exp": torch.full((ROWS, HEADS, IMAGE), 3.0),
    }


def unit_weights_with(number: float) -> torch.Tensor:
    unit_weights = torch.ones(ROWS, TEXT, UNITS)
    unit_weights[1, 3, 2] = number
    return unit_weights


BUFFER = torch.zeros(ROWS, IMAGE, UNITS)

# fmt: off
CASES: list[tuple[str, type[Exception], str, Change]] = [
    # name, error, argument, changed arguments
    ("query is no tensor", TypeError, "query", lambda a: {"query": a["query"].tolist()}),
    ("query of rank 3", ValueError, "query", lambda a: {"query": a["query"][0]}),
    ("query of int64", TypeError, "query", lambda a: {"query": a["query"].long()}),
    ("query without tokens", ValueError, "query", lambda a: {"query": a["query"][:, :, :0]}),
    ("key of another batch", ValueError, "key", lambda a: {"key": a["key"][:1]}),
    ("key of one head", ValueError, "key", lambda a: {"key": a["key"][:, :1]}),
    ("key of another head dim", ValueError, "key", lambda a: {"key": a["key"][..., :4]}),
    ("key of another dtype", TypeError, "key", lambda a: {"key": a["key"].double()}),
    ("key on another device", ValueError, "key", lambda a: {"key": a["key"].to("meta")}),
    ("key without tokens", ValueError, "key", lambda a: {"key": a["key"][:, :, :0]}),
    ("unit_weights is None", TypeError, "unit_weights", lambda a: {"unit_weights": None}),
    ("unit_weights of rank 2", ValueError, "unit_weights", lambda a: {"unit_weights": a["unit_weights"][0]}),
    ("unit_weights of bool", TypeError, "unit_weights", lambda a: {"unit_weights": a["unit_weights"].bool()}),
    ("unit_weights of one row", ValueError, "unit_weights", lambda a: {"unit_weights": a["unit_weights"][:1]}),
    ("unit_weights of another text length", ValueError, "unit_weights",
     lambda a: {"unit_weights": a["unit_weights"][:, :4]}),
    ("unit_weights without units", ValueError, "unit_weights", lambda a: {"unit_weights": a["unit_weights"][..., :0]}),
    ("a negative unit weight", ValueError, "unit_weights", lambda a: {"unit_weights": unit_weights_with(-0.5)}),
    ("a NaN unit weight", ValueError, "unit_weights", lambda a: {"unit_weights": unit_weights_with(float("nan"))}),
    ("log_sum_exp is None", TypeError, "log_sum_exp", lambda a: {"log_sum_exp": None}),
    ("log_sum_exp of rank 4", ValueError, "log_sum_exp", lambda a: {"log_sum_exp": a["log_sum_exp"][..., None]}),
    ("log_sum_exp of [rows, N, heads]", ValueError, "log_sum_exp",
     lambda a: {"log_sum_exp": a["log_sum_exp"].transpose(1, 2)}),
    ("log_sum_exp of the text tokens", ValueError, "log_sum_exp",
     lambda a: {"log_sum_exp": a["log_sum_exp"][:, :, :TEXT]}),
    ("log_sum_exp of bfloat16", TypeError, "log_sum_exp", lambda a: {"log_sum_exp": a["log_sum_exp"].bfloat16()}),
    ("log_sum_exp on another device", ValueError, "log_sum_exp",
     lambda a: {"log_sum_exp": a["log_sum_exp"].to("meta")}),
    ("queries and keys of the other direction", ValueError, "unit_weights",
     lambda a: {"direction": "text_to_image"}),
    ("scale is zero", ValueError, "scale", lambda a: {"scale": 0.0}),
    ("scale is a tensor", TypeError, "scale", lambda a: {"scale": torch.tensor(0.5)}),
    ("text_lengths is a list", TypeError, "text_lengths", lambda a: {"text_lengths": [5, 3]}),
    ("text_lengths of rank 2", ValueError, "text_lengths", lambda a: {"text_lengths": torch.tensor([[5, 3]])}),
    ("text_lengths of one row", ValueError, "text_lengths", lambda a: {"text_lengths": torch.tensor([5])}),
    ("text_lengths of float32", TypeError, "text_lengths", lambda a: {"text_lengths": torch.tensor([5.0, 3.0])}),
    ("text_lengths on another device", ValueError, "text_lengths",
     lambda a: {"text_lengths": torch.tensor([5, 3], device="meta")}),
    ("a negative text length", ValueError, "text_lengths", lambda a: {"text_lengths": torch.tensor([5, -1])}),
    ("a text length beyond the text", ValueError, "text_lengths", lambda a: {"text_lengths": torch.tensor([6, 3])}),
    ("mass of another shape", ValueError, "mass", lambda a: {"mass": torch.zeros(ROWS, IMAGE, 1)}),
    ("mass of bfloat16", TypeError, "mass", lambda a: {"mass": BUFFER.bfloat16()}),
    ("mass that requires a gradient", ValueError, "mass", lambda a: {"mass": BUFFER.clone().requires_grad_()}),
    ("mass that is expanded", ValueError, "mass", lambda a: {"mass": BUFFER[:1].expand(ROWS, -1, -1)}),
    ("layer_weight is negative", ValueError, "layer_weight", lambda a: {"layer_weight": -0.1}),
    ("an unknown direction", ValueError, "direction", lambda a: {"direction": "both"}),
    ("an unknown backend", ValueError, "backend", lambda a: {"backend": "cuda"}),
    ("backend is no string", TypeError, "backend", lambda a: {"backend": None}),
]
# fmt: on


def test_the_arguments_that_the_cases_change_are_good() -> None:
    attention_mass(**arguments(), mass=BUFFER.clone(), text_lengths=torch.tensor([5, 0]))


@pytest.mark.parametrize(("error", "argument", "change"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_names_the_argument(error: type[Exception], argument: str, change: Change) -> None:
    good = arguments()
    buffer = BUFFER.clone()
    with pytest.raises(error, match=rf"^{argument}: expected .+, got ") as raised:
        attention_mass(**{**good, "mass": buffer, **change(good)})
    assert type(raised.value) is error
    assert buffer.count_nonzero() == 0


def test_torch_func_and_forward_mode_are_refused() -> None:
    good = arguments()
    with pytest.raises(NotImplementedError, match="attention_mass: torch.func"):
        torch.func.grad(lambda query: attention_mass(**{**good, "query": query}).sum())(good["query"])
