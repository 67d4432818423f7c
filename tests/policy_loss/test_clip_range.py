"""The clip range of a position from an image's: it clips as many, and bad input is an error that names the argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import star_kernels as sk


def test_a_number_gives_a_number_and_a_pair_a_pair() -> None:
    assert sk.position_clip_range(1e-4, 64, 64) == pytest.approx(6.4e-3, rel=1e-12)
    assert sk.position_clip_range(1e-5, 32, 128) == pytest.approx(6.4e-4, rel=1e-12)
    assert sk.position_clip_range((1e-3, 2e-3), 16, 4) == pytest.approx((8e-3, 1.6e-2), rel=1e-12)
    assert sk.position_clip_range([1e-3, 2e-3], 16, 4) == sk.position_clip_range((1e-3, 2e-3), 16, 4)
    assert sk.position_clip_range(0.5, 1, 1) == 0.5


def test_it_clips_as_many_positions_as_the_range_that_it_was_made_from_clips_images() -> None:
    shape, image, generator = (4096, 4, 6, 8), 1e-3, torch.Generator().manual_seed(0)
    row = sk.transition_coefficients("dance_sde", torch.tensor([0.7]), torch.tensor([0.5]))
    velocity, sample, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    step = sk.transition_step(velocity, sample, row, noise=noise)
    # An update of one size everywhere, after which the spread of an image's log-ratio is its range.
    size = image * (4 * 6 * 8) ** 0.5 * float(row.std / row.velocity_scale.abs())
    moved = velocity + size * torch.randn(shape, generator=generator).sign()
    ranges = {"image": image, "position": sk.position_clip_range(image, 6, 8)}
    fractions = {
        granularity: float(
            sk.policy_loss(
                moved, sample, step.next_sample, step.log_prob, torch.ones(shape[0]), row,
                granularity=granularity, clip_range=clip_range,
            ).metrics["clip_fraction"]
        )
        for granularity, clip_range in ranges.items()
    }  # fmt: skip
    # 32 % of a normal distribution lies further from its middle than its spread.
    assert fractions == pytest.approx({"image": 0.317, "position": 0.317}, abs=0.02)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "image_clip_range", (None, 4, 4)),
        (TypeError, "image_clip_range", (True, 4, 4)),
        (TypeError, "image_clip_range", (("1e-4", 1e-4), 4, 4)),
        (ValueError, "image_clip_range", ((1e-4,), 4, 4)),
        (ValueError, "image_clip_range", (-1e-4, 4, 4)),
        (ValueError, "image_clip_range", (float("nan"), 4, 4)),
        (ValueError, "image_clip_range", (0.25, 4, 4)),
        (ValueError, "image_clip_range", ((0.1, 0.3), 4, 4)),
        (TypeError, "height", (1e-4, 4.0, 4)),
        (TypeError, "height", (1e-4, True, 4)),
        (ValueError, "height", (1e-4, 0, 4)),
        (TypeError, "width", (1e-4, 4, "4")),
        (ValueError, "width", (1e-4, 4, -4)),
    ],
)
def test_bad_input_names_the_argument(error: type[Exception], name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=rf"^{name}: expected .*, got "):
        sk.position_clip_range(*arguments)
