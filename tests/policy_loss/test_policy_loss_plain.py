"""The loss with its arguments checked in C++: taken where nothing has to be converted, and the same bits as without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import star_kernels as sk
from star_kernels.policy_loss import cpu
from tests.policy_loss.cases import make_case

pytestmark = pytest.mark.skipif(sk.available_backends()["cpu"] is not None, reason="the C++ extension is not built")

Case = dict[str, Any]


@pytest.fixture
def is_plain(monkeypatch) -> Callable[[Case], bool]:
    """Whether the arguments of a case are checked in C++, after comparing the results with those of Python's checks."""
    checked_in_cpp = cpu.plain_policy_loss
    outputs: list[tuple[Tensor, ...] | None] = []

    def spy(*arguments: Any) -> tuple[Tensor, ...] | None:
        outputs.append(checked_in_cpp(*arguments))
        return outputs[-1]

    def run(case: Case, check: Callable[..., Any]) -> list[Tensor]:
        monkeypatch.setattr(cpu, "plain_policy_loss", check)
        velocity = case["velocity"].detach().requires_grad_()
        result = sk.policy_loss(**{**case, "velocity": velocity})
        assert not any(value.requires_grad for value in result.metrics.values())
        return [result.loss.detach(), *torch.autograd.grad(result.loss, velocity), *result.metrics.values()]

    def compare(case: Case) -> bool:
        outputs.clear()
        found, expected = run(case, spy), run(case, lambda *_: None)
        assert len(found) == 2 + 8 + ("old_velocity" in case)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return any(output is not None for output in outputs)

    return compare


def one_row(case: Case) -> Case:
    return {"coefficients": sk.transition_coefficients("flow_sde", torch.tensor([0.6]), torch.tensor([0.5]))}


PLAIN: list[Callable[[Case], Case]] = [
    lambda case: {},
    one_row,
    lambda case: {"clip_range": 1e-3},
    lambda case: {"weights": None, "mask": None, "reference_velocity": None, "kl_weight": 0.0},
    lambda case: {"weights": case["weights"].double(), "old_log_prob": case["old_log_prob"].bfloat16()},
    lambda case: {"granularity": "image", "kl_scale": "std_dev"},
    lambda case: {"kl_scale": "velocity", "old_velocity": case["sample"]},
    lambda case: {"objective": "none", "divergence_limit": 0.5},
    lambda case: {"objective": "guard", "old_velocity": case["velocity"].bfloat16()},
    lambda case: {"objective": "dppo", "old_velocity": case["velocity"] + 0.01, "divergence_limit": 1e-5},
    lambda case: {"unconditional_velocity": case["sample"] * 0.1, "guidance_scale": 3.0},
    lambda case: {"velocity": case["velocity"].bfloat16(), "sample": case["sample"].half()},
    lambda case: {
        "velocity": case["velocity"].to(memory_format=torch.channels_last),
        "mask": case["mask"].mT.clone().mT,
    },
    lambda case: {"backend": "cpu"},
]
OTHER: list[Callable[[Case], Case]] = [
    lambda case: {"mask": case["mask"].float()},
    lambda case: {"clip_range": [2e-3, 5e-3]},
    lambda case: {"kl_weight": 0},
    lambda case: {"objective": "dppo", "old_velocity": case["velocity"] + 0.01, "divergence_limit": 0},
    lambda case: {"sample": case["sample"].double()},
    lambda case: {"backend": "reference"},
]


@pytest.mark.parametrize("change", PLAIN)
def test_arguments_that_need_no_conversion_are_checked_in_cpp(is_plain, change):
    case = make_case()
    assert is_plain(case | change(case))


@pytest.mark.parametrize("change", OTHER)
def test_other_arguments_are_left_to_python(is_plain, change):
    case = make_case()
    assert not is_plain(case | change(case))


def test_a_variable_of_the_environment_still_chooses_the_backend(is_plain, monkeypatch):
    monkeypatch.setenv("STAR_KERNELS_BACKEND", "reference")
    assert not is_plain(make_case())


def test_bounds_of_the_clip_range_and_rows_of_the_coefficients_do_not_change_places(is_plain):
    case = make_case(move=1.0) | {"clip_range": (0.0, 0.9)}
    assert is_plain(case)
    low, high = sk.policy_loss(**case), sk.policy_loss(**case | {"clip_range": (0.9, 0.0)})
    assert low.metrics["clip_fraction"] != high.metrics["clip_fraction"]
    coefficients = replace(case["coefficients"], noise_rate=2 * case["coefficients"].noise_rate)
    assert is_plain(case | {"coefficients": coefficients, "kl_scale": "std_dev"})


def test_the_gradient_is_left_out_where_none_is_wanted(is_plain):
    case = make_case()
    assert not sk.policy_loss(**case).loss.requires_grad
    with torch.no_grad():
        assert not sk.policy_loss(**case | {"velocity": case["velocity"].requires_grad_()}).loss.requires_grad


def test_whoever_watches_the_operators_sees_them(monkeypatch):
    monkeypatch.setattr(cpu, "plain_policy_loss", lambda *_: pytest.fail("checked in C++"))

    class Watch(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **kwargs or {})

    with Watch():
        sk.policy_loss(**make_case())
    assert "star_kernels.policy_loss.default" in Watch.seen
