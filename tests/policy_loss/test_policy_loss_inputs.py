"""Every bad input of the loss is an error that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from star_kernels import policy_loss, transition_coefficients
from tests.policy_loss.cases import make_case

LATENT = (3, 4, 6, 8)
GRID = (3, 6, 8)
NAN = float("nan")


def meta(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device="meta")


def coefficients(kind: str, batch: int = 3) -> Any:
    return transition_coefficients(kind, torch.full((batch,), 0.5), 0.3)


@pytest.mark.parametrize(
    ("error", "name", "changes"),
    [
        (TypeError, "velocity", {"velocity": None}),
        (TypeError, "velocity", {"velocity": torch.ones(LATENT, dtype=torch.int64)}),
        (ValueError, "velocity", {"velocity": torch.rand(LATENT[1:])}),
        (ValueError, "velocity", {"velocity": torch.rand(0, 4, 6, 8)}),
        (ValueError, "velocity", {"velocity": torch.rand(3, 4, 0, 8)}),
        (ValueError, "sample", {"sample": torch.rand(1, 4, 6, 8)}),
        (ValueError, "sample", {"sample": meta(*LATENT)}),
        (TypeError, "sample", {"sample": torch.ones(LATENT, dtype=torch.complex64)}),
        (ValueError, "next_sample", {"next_sample": torch.rand(3, 4, 8, 6)}),
        (ValueError, "next_sample", {"next_sample": meta(*LATENT)}),
        (ValueError, "old_log_prob", {"old_log_prob": torch.rand(3)}),
        (ValueError, "old_log_prob", {"old_log_prob": torch.rand(3, 1, 1)}),
        (ValueError, "old_log_prob", {"old_log_prob": meta(*GRID)}),
        (ValueError, "advantage", {"advantage": torch.rand(1)}),
        (ValueError, "advantage", {"advantage": torch.rand(3, 1)}),
        (TypeError, "advantage", {"advantage": torch.ones(3, dtype=torch.int64)}),
        (TypeError, "advantage", {"advantage": 1.0}),
        (ValueError, "advantage", {"advantage": meta(3)}),
        (TypeError, "coefficients", {"coefficients": {"std": 1.0}}),
        (ValueError, "coefficients.sample_drift", {"coefficients": coefficients("flow_sde", 2)}),
        (ValueError, "coefficients", {"coefficients": coefficients("ode")}),
        (ValueError, "weights", {"weights": torch.rand(3, 4, 4)}),
        (ValueError, "weights", {"weights": torch.rand(3, 3, 16)}),
        (ValueError, "weights", {"weights": torch.rand(3, 3)}),
        (ValueError, "weights", {"weights": torch.rand(3, 0, 4)}),
        (ValueError, "weights", {"weights": torch.rand(1, 3, 4)}),
        (ValueError, "weights", {"weights": torch.full((3, 3, 4), -0.1)}),
        (TypeError, "weights", {"weights": torch.ones(3, 3, 4, dtype=torch.int64)}),
        (ValueError, "weights", {"weights": meta(3, 3, 4)}),
        (ValueError, "mask", {"mask": torch.ones(3, 3, 4, dtype=torch.bool)}),
        (ValueError, "mask", {"mask": torch.ones(3, 1, 6, 8, dtype=torch.bool)}),
        (TypeError, "mask", {"mask": torch.ones(GRID, dtype=torch.int64)}),
        (ValueError, "mask", {"mask": meta(*GRID)}),
        (ValueError, "clip_range", {"clip_range": 1.0}),
        (ValueError, "clip_range", {"clip_range": -1e-4}),
        (ValueError, "clip_range", {"clip_range": NAN}),
        (ValueError, "clip_range", {"clip_range": (0.1, 1.0)}),
        (ValueError, "clip_range", {"clip_range": (-0.1, 0.1)}),
        (ValueError, "clip_range", {"clip_range": (0.1,)}),
        (ValueError, "clip_range", {"clip_range": (0.1, 0.2, 0.3)}),
        (TypeError, "clip_range", {"clip_range": ("0.1", "0.2")}),
        (TypeError, "clip_range", {"clip_range": None}),
        (ValueError, "objective", {"objective": "ppo"}),
        (ValueError, "old_velocity", {"objective": "guard"}),
        (ValueError, "old_velocity", {"objective": "dppo", "divergence_limit": 1e-5}),
        (ValueError, "old_velocity", {"old_velocity": torch.rand(3, 4, 6, 4)}),
        (ValueError, "old_velocity", {"old_velocity": meta(*LATENT)}),
        (TypeError, "old_velocity", {"old_velocity": 0.0}),
        (ValueError, "divergence_limit", {"objective": "dppo", "old_velocity": torch.rand(LATENT)}),
        (ValueError, "divergence_limit", {"divergence_limit": -1e-5}),
        (ValueError, "divergence_limit", {"divergence_limit": NAN}),
        (TypeError, "divergence_limit", {"divergence_limit": "1e-5"}),
        (ValueError, "granularity", {"granularity": "token"}),
        (ValueError, "kl_scale", {"kl_scale": "sigma"}),
        (ValueError, "kl_scale", {"kl_scale": "std_dev", "coefficients": coefficients("cps")}),
        (ValueError, "kl_weight", {"kl_weight": -0.1}),
        (ValueError, "kl_weight", {"kl_weight": NAN}),
        (TypeError, "kl_weight", {"kl_weight": "0.1"}),
        (ValueError, "reference_velocity", {"reference_velocity": None}),
        (ValueError, "reference_velocity", {"reference_velocity": torch.rand(3, 4, 6, 4)}),
        (ValueError, "reference_velocity", {"reference_velocity": meta(*LATENT)}),
        (ValueError, "unconditional_velocity", {"guidance_scale": 4.5}),
        (ValueError, "unconditional_velocity", {"unconditional_velocity": torch.rand(3, 4, 6, 4)}),
        (ValueError, "guidance_scale", {"unconditional_velocity": torch.rand(LATENT), "guidance_scale": -1.0}),
        (TypeError, "guidance_scale", {"unconditional_velocity": torch.rand(LATENT), "guidance_scale": None}),
        (ValueError, "backend", {"backend": "cuda"}),
    ],
)
def test_bad_input_names_the_argument(error: type[Exception], name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=rf"^{name}\b.*(got|cannot run)"):
        policy_loss(**(make_case() | changes))


def test_an_unknown_backend_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAR_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="^STAR_KERNELS_BACKEND"):
        policy_loss(**make_case())


def test_triton_kernels_on_the_cpu_are_refused_unless_they_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="^backend='triton' cannot run policy_loss: its tensors are on the CPU"):
        policy_loss(**make_case(), backend="triton")


def test_torch_func_and_forward_mode_are_refused() -> None:
    case = make_case()
    velocity = case.pop("velocity")

    def loss(velocity: torch.Tensor) -> torch.Tensor:
        return policy_loss(velocity, **case).loss

    for transformed in (
        lambda: torch.func.grad(loss)(velocity),
        lambda: torch.func.vmap(loss)(velocity[None]),
        lambda: torch.func.jvp(loss, (velocity,), (velocity,)),
    ):
        with pytest.raises(NotImplementedError, match="^policy_loss: torch.func transforms are out of scope"):
            transformed()
    with forward_ad.dual_level():
        assert loss(velocity).isfinite()
        with pytest.raises(NotImplementedError, match="^policy_loss: forward-mode derivatives are out of scope"):
            loss(forward_ad.make_dual(velocity, velocity))
