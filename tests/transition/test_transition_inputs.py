"""Every bad input of the transition operators is an error that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from star_kernels import TransitionCoefficients, transition_coefficients, transition_log_prob, transition_step
from star_kernels._gaussian import check_coefficients

SHAPE = (2, 3, 4, 5)
NOISY = transition_coefficients("flow_sde", torch.tensor([0.9, 0.5]), 0.3)
STILL = transition_coefficients("ode", torch.tensor([0.9, 0.5]), 0.3)


def rand(*shape: int, **options: Any) -> torch.Tensor:
    return torch.rand(shape, **options)


def of_batch(batch: int) -> TransitionCoefficients:
    return transition_coefficients("flow_sde", torch.full((batch,), 0.5), 0.3)


def with_row(**rows: Any) -> TransitionCoefficients:
    return TransitionCoefficients(
        **{"sample_drift": NOISY.sample_drift, "velocity_scale": NOISY.velocity_scale, "std": NOISY.std, **rows}
    )


BOTH = [
    (TypeError, "velocity", {"velocity": [[1.0]]}),
    (TypeError, "velocity", {"velocity": torch.ones(SHAPE, dtype=torch.int64)}),
    (TypeError, "velocity", {"velocity": torch.ones(SHAPE, dtype=torch.complex64)}),
    (ValueError, "velocity", {"velocity": rand(3, 4, 5)}),
    (ValueError, "velocity", {"velocity": rand(2, 0, 4, 5)}),
    (ValueError, "velocity", {"velocity": rand(0, 3, 4, 5)}),
    (ValueError, "sample", {"sample": rand(2, 3, 5, 4)}),
    (ValueError, "sample", {"sample": rand(1, 3, 4, 5)}),
    (ValueError, "sample", {"sample": rand(*SHAPE, device="meta")}),
    (TypeError, "sample", {"sample": None}),
    (TypeError, "coefficients", {"coefficients": (1.0, 2.0, 3.0)}),
    (TypeError, "coefficients", {"coefficients": None}),
    (ValueError, "coefficients.sample_drift", {"coefficients": of_batch(3)}),
    (ValueError, "coefficients.std", {"coefficients": with_row(std=rand(2, 1, 1, 1))}),
    (ValueError, "coefficients.std", {"coefficients": with_row(std=rand(2, device="meta"))}),
    (TypeError, "coefficients.velocity_scale", {"coefficients": with_row(velocity_scale=0.5)}),
    (TypeError, "coefficients.sample_drift", {"coefficients": with_row(sample_drift=torch.ones(2, dtype=torch.int32))}),
    (ValueError, "unconditional_velocity", {"guidance_scale": 4.5}),
    (ValueError, "unconditional_velocity", {"unconditional_velocity": rand(2, 3, 4, 1)}),
    (ValueError, "unconditional_velocity", {"unconditional_velocity": rand(*SHAPE, device="meta")}),
    (ValueError, "guidance_scale", {"unconditional_velocity": rand(*SHAPE), "guidance_scale": -1.0}),
    (ValueError, "guidance_scale", {"unconditional_velocity": rand(*SHAPE), "guidance_scale": float("nan")}),
    (TypeError, "guidance_scale", {"unconditional_velocity": rand(*SHAPE), "guidance_scale": torch.tensor(2.0)}),
    (ValueError, "backend", {"backend": "cuda"}),
]


@pytest.mark.parametrize(
    ("error", "name", "changes"),
    [
        *BOTH,
        (ValueError, "noise", {"noise": None}),
        (ValueError, "noise", {"noise": rand(2, 3, 4, 6)}),
        (ValueError, "noise", {"noise": rand(*SHAPE, device="meta")}),
        (TypeError, "noise", {"noise": torch.ones(SHAPE, dtype=torch.bool)}),
        (ValueError, "noise", {"coefficients": STILL, "noise": rand(2, 3, 4, 6)}),
    ],
)
def test_bad_input_of_a_step_names_the_argument(error: type[Exception], name: str, changes: dict[str, Any]) -> None:
    arguments = {"velocity": rand(*SHAPE), "sample": rand(*SHAPE), "coefficients": NOISY, "noise": rand(*SHAPE)}
    with pytest.raises(error, match=rf"^{name}\b.*(got|cannot run)"):
        transition_step(**(arguments | changes))


@pytest.mark.parametrize(
    ("error", "name", "changes"),
    [
        *BOTH,
        (ValueError, "coefficients", {"coefficients": STILL}),
        (ValueError, "next_sample", {"next_sample": rand(2, 3, 4, 6)}),
        (ValueError, "next_sample", {"next_sample": rand(*SHAPE, device="meta")}),
        (TypeError, "next_sample", {"next_sample": torch.ones(SHAPE, dtype=torch.int64)}),
    ],
)
def test_bad_input_of_a_log_prob_names_the_argument(error: type[Exception], name: str, changes: dict[str, Any]) -> None:
    arguments = {"velocity": rand(*SHAPE), "sample": rand(*SHAPE), "next_sample": rand(*SHAPE), "coefficients": NOISY}
    with pytest.raises(error, match=rf"^{name}\b.*(got|cannot run)"):
        transition_log_prob(**(arguments | changes))


def test_triton_kernels_on_the_cpu_are_refused_unless_they_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="^backend='triton' cannot run transition_step: its tensors are on the CPU"):
        transition_step(rand(*SHAPE), rand(*SHAPE), NOISY, noise=rand(*SHAPE), backend="triton")


def test_several_coefficients_on_the_cpu_are_refused_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^coefficients: .*got 2 rows on the CPU; coefficients.to\(device\)"):
        check_coefficients(of_batch(2), 2, torch.device("cuda"))
    assert check_coefficients(of_batch(1), 2, torch.device("cuda")).std.is_cpu
