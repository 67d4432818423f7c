"""Every bad input of joint_attention raises an error that names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from star_kernels import joint_attention

BATCH, HEADS, IMAGE, TEXT, DIM, UNITS = 2, 3, 10, 5, 8, 4
Change = Callable[[dict[str, Any]], dict[str, Any]]


def arguments() -> dict[str, Any]:
    shape = (BATCH, HEADS, IMAGE + TEXT, DIM)
    query, key, value = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    return {
        "query": query,
        "key": key,
        "value": value,
        "unit_weights": torch.ones(BATCH, TEXT, UNITS),
        "num_image_tokens": IMAGE,
    }


def unit_weights_with(number: float) -> torch.Tensor:
    unit_weights = torch.ones(BATCH, TEXT, UNITS)
    unit_weights[1, 3, 2] = number
    return unit_weights


BUFFER = torch.zeros(BATCH, IMAGE, UNITS)

# fmt: off
CASES: list[tuple[str, type[Exception], str, Change]] = [
    # name, error, argument, changed arguments
    ("query is no tensor", TypeError, "query", lambda a: {"query": a["query"].tolist()}),
    ("query of rank 3", ValueError, "query", lambda a: {"query": a["query"][0]}),
    ("query of int64", TypeError, "query", lambda a: {"query": a["query"].long()}),
    ("query without samples", ValueError, "query", lambda a: {"query": a["query"][:0]}),
    ("query without tokens", ValueError, "query", lambda a: {"query": a["query"][:, :, :0]}),
    ("query without head dim", ValueError, "query", lambda a: {"query": a["query"][..., :0]}),
    ("key of another batch", ValueError, "key", lambda a: {"key": a["key"][:1]}),
    ("key of one head", ValueError, "key", lambda a: {"key": a["key"][:, :1]}),
    ("key of another head dim", ValueError, "key", lambda a: {"key": a["key"][..., :4]}),
    ("key of rank 3", ValueError, "key", lambda a: {"key": a["key"][0]}),
    ("key of another dtype", TypeError, "key", lambda a: {"key": a["key"].double()}),
    ("key on another device", ValueError, "key", lambda a: {"key": a["key"].to("meta")}),
    ("key without tokens", ValueError, "key", lambda a: {"key": a["key"][:, :, :0], "value": a["value"][:, :, :0]}),
    ("key of another length in a joint sequence", ValueError, "key",
     lambda a: {"key": a["key"][:, :, :12], "value": a["value"][:, :, :12], "unit_weights": None}),
    ("value of another length than key", ValueError, "value", lambda a: {"value": a["value"][:, :, :12]}),
    ("value of another dtype", TypeError, "value", lambda a: {"value": a["value"].bfloat16()}),
    ("value on another device", ValueError, "value", lambda a: {"value": a["value"].to("meta")}),
    ("unit_weights is no tensor", TypeError, "unit_weights", lambda a: {"unit_weights": [[1.0]]}),
    ("unit_weights of rank 2", ValueError, "unit_weights", lambda a: {"unit_weights": a["unit_weights"][0]}),
    ("unit_weights of bool", TypeError, "unit_weights", lambda a: {"unit_weights": a["unit_weights"].bool()}),
    ("unit_weights of one row", ValueError, "unit_weights", lambda a: {"unit_weights": a["unit_weights"][:1]}),
    ("unit_weights of another text length", ValueError, "unit_weights",
     lambda a: {"unit_weights": a["unit_weights"][:, :4]}),
    ("unit_weights without units", ValueError, "unit_weights", lambda a: {"unit_weights": a["unit_weights"][..., :0]}),
    ("unit_weights on another device", ValueError, "unit_weights",
     lambda a: {"unit_weights": a["unit_weights"].to("meta")}),
    ("unit_weights for all rows where some are captured", ValueError, "unit_weights", lambda a: {"rows": (1, 2)}),
    ("unit_weights of text that image-only attention lacks", ValueError, "unit_weights",
     lambda a: {"num_image_tokens": IMAGE + TEXT}),
    ("a negative unit weight", ValueError, "unit_weights", lambda a: {"unit_weights": unit_weights_with(-0.5)}),
    ("a NaN unit weight", ValueError, "unit_weights", lambda a: {"unit_weights": unit_weights_with(float("nan"))}),
    ("an infinite unit weight", ValueError, "unit_weights",
     lambda a: {"unit_weights": unit_weights_with(float("inf"))}),
    ("num_image_tokens is zero", ValueError, "num_image_tokens", lambda a: {"num_image_tokens": 0}),
    ("num_image_tokens beyond the queries", ValueError, "num_image_tokens", lambda a: {"num_image_tokens": 16}),
    ("num_image_tokens is a float", TypeError, "num_image_tokens", lambda a: {"num_image_tokens": 10.0}),
    ("num_image_tokens is a bool", TypeError, "num_image_tokens", lambda a: {"num_image_tokens": True}),
    ("text_first is a string", TypeError, "text_first", lambda a: {"text_first": "yes"}),
    ("scale is zero", ValueError, "scale", lambda a: {"scale": 0.0}),
    ("scale is negative", ValueError, "scale", lambda a: {"scale": -1.0}),
    ("scale is NaN", ValueError, "scale", lambda a: {"scale": float("nan")}),
    ("scale is infinite", ValueError, "scale", lambda a: {"scale": float("inf")}),
    ("scale is a tensor", TypeError, "scale", lambda a: {"scale": torch.tensor(0.5)}),
    ("mass is no tensor", TypeError, "mass", lambda a: {"mass": 0.0}),
    ("mass of another shape", ValueError, "mass", lambda a: {"mass": torch.zeros(BATCH, IMAGE, 1)}),
    ("mass of all rows where some are captured", ValueError, "mass",
     lambda a: {"mass": BUFFER, "rows": (1, 2), "unit_weights": a["unit_weights"][:1]}),
    ("mass of bfloat16", TypeError, "mass", lambda a: {"mass": BUFFER.bfloat16()}),
    ("mass of float64 for float32 input", TypeError, "mass", lambda a: {"mass": BUFFER.double()}),
    ("mass on another device", ValueError, "mass", lambda a: {"mass": BUFFER.to("meta")}),
    ("mass that requires a gradient", ValueError, "mass", lambda a: {"mass": BUFFER.clone().requires_grad_()}),
    ("mass that is expanded", ValueError, "mass", lambda a: {"mass": BUFFER[:1].expand(BATCH, -1, -1)}),
    ("mass without unit_weights", ValueError, "mass", lambda a: {"mass": BUFFER, "unit_weights": None}),
    ("layer_weight is negative", ValueError, "layer_weight", lambda a: {"layer_weight": -0.1}),
    ("layer_weight is NaN", ValueError, "layer_weight", lambda a: {"layer_weight": float("nan")}),
    ("rows beyond the batch", ValueError, "rows", lambda a: {"rows": (1, 3)}),
    ("rows that are empty", ValueError, "rows", lambda a: {"rows": (1, 1)}),
    ("rows that start below zero", ValueError, "rows", lambda a: {"rows": (-1, 2)}),
    ("rows is one number", TypeError, "rows", lambda a: {"rows": 1}),
    ("rows of floats", TypeError, "rows", lambda a: {"rows": (0.0, 1.0)}),
    ("rows without unit_weights", ValueError, "rows", lambda a: {"rows": (0, 1), "unit_weights": None}),
    ("text_lengths is a list", TypeError, "text_lengths", lambda a: {"text_lengths": [1, 2]}),
    ("text_lengths of another batch", ValueError, "text_lengths", lambda a: {"text_lengths": torch.tensor([1])}),
    ("text_lengths of floats", TypeError, "text_lengths", lambda a: {"text_lengths": torch.ones(BATCH)}),
    ("text_lengths on another device", ValueError, "text_lengths",
     lambda a: {"text_lengths": torch.ones(BATCH, dtype=torch.int32, device="meta")}),
    ("a negative text length", ValueError, "text_lengths", lambda a: {"text_lengths": torch.tensor([1, -1])}),
    ("a text length beyond the text", ValueError, "text_lengths", lambda a: {"text_lengths": torch.tensor([1, 6])}),
    ("no text where all keys are text", ValueError, "text_lengths",
     lambda a: {"text_lengths": torch.tensor([3, 0]), "num_image_tokens": 15, "unit_weights": None}),
    ("an unknown implementation", ValueError, "implementation", lambda a: {"implementation": "flash"}),
    ("implementation is no string", ValueError, "implementation", lambda a: {"implementation": None}),
    ("an unknown direction", ValueError, "direction", lambda a: {"direction": "both"}),
    ("text queries asked of cross-attention", ValueError, "direction",
     lambda a: {"direction": "text_to_image", "num_image_tokens": 15, "unit_weights": torch.ones(BATCH, 15, UNITS)}),
    ("an unknown backend", ValueError, "backend", lambda a: {"backend": "cuda"}),
    ("an unknown backend, and nothing captured", ValueError, "backend",
     lambda a: {"backend": "cuda", "unit_weights": None}),
    ("backend is no string", TypeError, "backend", lambda a: {"backend": None}),
]
# fmt: on


def test_the_arguments_that_the_cases_change_are_good() -> None:
    joint_attention(**arguments(), mass=BUFFER.clone(), rows=(0, BATCH))


@pytest.mark.parametrize(("error", "argument", "change"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_names_the_argument(error: type[Exception], argument: str, change: Change) -> None:
    good = arguments()
    changed = {**good, **change(good)}
    for implementation in ("fused", "sdpa") if argument != "implementation" else (changed["implementation"],):
        with pytest.raises(error, match=rf"^{argument}: expected .+, got ") as raised:
            joint_attention(**{**changed, "implementation": implementation})
        assert type(raised.value) is error


@pytest.mark.parametrize("implementation", ["fused", "sdpa"])
def test_a_rejected_call_leaves_the_buffer_alone(implementation: str) -> None:
    buffer = BUFFER.clone()
    changed = {**arguments(), "unit_weights": unit_weights_with(-1.0)}
    with pytest.raises(ValueError):
        joint_attention(**changed, mass=buffer, implementation=implementation)
    assert buffer.count_nonzero() == 0


def test_a_backend_that_cannot_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run joint_attention: .+"):
        joint_attention(**arguments(), backend="triton")


def test_the_environment_variable_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAR_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="^STAR_KERNELS_BACKEND: expected .+, got 'nonsense'"):
        joint_attention(**arguments())
