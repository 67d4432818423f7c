"""What a run's settings set up, and which checkpoints go on under them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from accelerate.state import AcceleratorState
from star_trainer.config import Config, load_config
from star_trainer.families.pipelines.sd3 import StableDiffusion3
from star_trainer.families.policy import load_policy
from star_trainer.run.checkpoint import CheckpointError
from star_trainer.run.state import TrainingState, _check_same_settings, build_state


def test_settings_reach_the_optimiser_and_torch() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for tf32 in (True, False):
            AcceleratorState._reset_state(reset_partial_state=True)
            state = build_state(load_config("tiny", ["train.betas=[0.5, 0.75]", f"model.tf32={tf32}"]))
            assert [group["betas"] for group in state.optimizer.param_groups] == [(0.5, 0.75)]
            assert torch.backends.cuda.matmul.allow_tf32 == tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_the_autoencoder_has_its_own_dtype() -> None:
    exact, mixed, plain = (
        load_policy(load_config("tiny", [f"model.dtype={dtype}", f"model.vae_dtype={of_vae}"]).model)
        for dtype, of_vae in (("float32", "null"), ("bfloat16", "float32"), ("bfloat16", "null"))
    )
    assert mixed.pipeline.vae.dtype == torch.float32 and mixed.pipeline.text_encoder.dtype == torch.bfloat16
    assert plain.pipeline.vae.dtype == torch.bfloat16
    latents = torch.randn(2, *exact.latent_shape, generator=torch.Generator().manual_seed(0))
    decoded = exact.decode(latents)
    assert (mixed.decode(latents) == decoded).all() and (plain.decode(latents) != decoded).any()


def state_of(config: Config) -> TrainingState:
    """As much of a state as has settings."""
    policy = SimpleNamespace(family=StableDiffusion3())
    return cast(TrainingState, SimpleNamespace(config=config, policy=policy, files={}))


@pytest.mark.parametrize(
    ("begun", "goes_on", "refused"),
    [
        (["train.betas=[0.9, 0.99]"], [], ""),
        (["train.betas=[0.9, 0.999]"], ["train.betas=[0.9, 0.99]"], "train.betas was [0.9, 0.99], is [0.9, 0.999]"),
        (
            ["reward.terms={geneval_graded: 1.0}"],
            ["reward.extra_objects=ignored"],
            "reward.extra_objects was 'ignored', is 'punished'",
        ),
    ],
    ids=["the same betas", "other betas", "a grade that ignored extras"],
)
def test_a_checkpoint_from_before_a_setting_had_what_was_built_in(
    begun: list[str], goes_on: list[str], refused: str
) -> None:
    config = load_config("tiny", begun)
    saved = config.model_dump(mode="json")
    del saved["train"]["betas"], saved["reward"]["extra_objects"], saved["model"]["vae_dtype"], saved["model"]["tf32"]
    same = load_config("tiny", [*begun, *goes_on])
    _check_same_settings({"config": saved}, state_of(same), Path("runs/old"))
    if refused:
        with pytest.raises(CheckpointError) as caught:
            _check_same_settings({"config": saved}, state_of(config), Path("runs/old"))
        assert refused in str(caught.value)


@pytest.mark.parametrize("said", [{}, {"granularity": None}], ids=["before it was a setting", "null"])
@pytest.mark.parametrize(("method", "where"), [("star", "position"), ("oracle", "position"), ("uniform", "image")])
def test_a_checkpoint_goes_on_where_its_ratios_were_taken(method: str, where: str, said: dict[str, None]) -> None:
    same, other = (
        load_config("tiny", [f"method={method}", f"train.granularity={each}"])
        for each in (where, "image" if where == "position" else "position")
    )
    saved = same.model_dump(mode="json")
    del saved["train"]["granularity"]
    saved["train"] |= said
    _check_same_settings({"config": saved}, state_of(same), Path("runs/old"))
    with pytest.raises(CheckpointError, match=f"train.granularity was '{where}', is "):
        _check_same_settings({"config": saved}, state_of(other), Path("runs/old"))
