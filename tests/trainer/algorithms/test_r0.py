"""R0: its gradient against autograd through the whole sampler, what shapes that gradient, and short real runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file
from star_trainer.algorithms import r0
from star_trainer.cli import main
from star_trainer.config import ConfigError, load_config
from star_trainer.dry_run import plan
from star_trainer.families.policy import Policy
from star_trainer.prompts import Prompt
from star_trainer.rewards import NotDifferentiable, RewardError, check_differentiable
from star_trainer.run.state import TrainingState, build_state
from star_trainer.sampling import NonFiniteError
from star_trainer.worlds.scenes.captions import sample_prompts
from torch import Tensor

from bench.harness import CpuClock

SMALL = ["rollout.prompts=3", "rollout.samples=1", "rollout.steps=3", "train.batch_size=3", "r0.decode_batch_size=2"]


def redness(images: Tensor, texts: Sequence[str]) -> Tensor:
    return (images[:, 0] - images[:, 1]).mean((1, 2))


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        raise RuntimeError("in its backward")


def brightness(images: Tensor, texts: Sequence[str]) -> Tensor:
    return images.square().mean((1, 2, 3))


SMOOTH = r0.Supervision({"redness": redness, "brightness": brightness}, {"redness": 1.0, "brightness": -0.5})


@pytest.fixture(scope="module")
def shared_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingState]:
    AcceleratorState._reset_state(True)
    state = build_state(load_config("tiny_r0", [*SMALL, f"run.folder={tmp_path_factory.mktemp('r0')}"]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in state.policy.trainable().items():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    yield state
    AcceleratorState._reset_state(True)


@pytest.fixture
def another_precision() -> Iterator[None]:
    """Room for a state of another precision than the shared one's, which a process has one of."""
    kept = dict(AcceleratorState._shared_state), dict(PartialState._shared_state)
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    PartialState._shared_state.update(kept[1])
    AcceleratorState._shared_state.update(kept[0])


@pytest.fixture
def prompts() -> list[Prompt]:
    return sample_prompts(np.random.default_rng(0), 3, held_out=False)


def with_settings(state: TrainingState, *overrides: str) -> TrainingState:
    state.config = load_config("tiny_r0", [*SMALL, f"run.folder={state.config.run.folder}", *overrides])
    return state


def gradient_of(state: TrainingState, prompts: Sequence[Prompt], supervision: r0.Supervision = SMOOTH) -> Tensor:
    """The gradient of minus the mean reward of iteration 0 by all trained parameters, as one vector."""
    parameters = list(state.policy.trainable().values())
    for parameter in parameters:
        parameter.grad = None
    r0.backward(state, supervision, prompts, range(len(prompts)), 0, 1.0 / len(prompts))
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    return torch.cat([gradient.flatten() for gradient in gradients]).clone()


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("steps", [None, 2, 1])
@pytest.mark.parametrize("method", ["r0", "r0_plus"])
def test_running_steps_again_gives_the_gradient_of_the_whole_graph(
    shared_state: TrainingState, prompts: list[Prompt], method: str, steps: int | None
) -> None:
    settings = [f"method={method}", f"r0.gradient_steps={steps or 'null'}"]
    again = gradient_of(with_settings(shared_state, *settings), prompts)
    kept = gradient_of(with_settings(shared_state, *settings, "r0.checkpointing=false"), prompts)
    assert relative(again, kept) < 1e-5
    if steps is not None:
        assert relative(gradient_of(with_settings(shared_state, f"method={method}"), prompts), kept) > 1e-2


def test_the_gradient_is_that_of_the_mean_reward(shared_state: TrainingState, prompts: list[Prompt]) -> None:
    """Against central differences along one direction, through all steps, the decoder and the rewards."""
    state = with_settings(shared_state, "r0.normalize_gradients=false")
    parameters = list(state.policy.trainable().values())
    gradient = gradient_of(state, prompts)
    # Along the gradient itself the difference stands out of the rounding.
    step = 2e-3 * gradient / gradient.norm()

    def mean_reward(sign: float) -> float:
        first = 0
        for parameter in parameters:
            parameter.data += sign * step[first : first + parameter.numel()].view_as(parameter)
            first += parameter.numel()
        return float(r0.backward(state, SMOOTH, prompts, range(3), 0, 1.0).rewards.mean())

    up = mean_reward(1.0)
    down = mean_reward(-2.0)
    mean_reward(1.0)
    assert (up - down) / 2 == pytest.approx(-float(gradient @ step), rel=2e-2)


def test_each_reward_weighs_what_its_weight_says_whatever_its_scale(
    shared_state: TrainingState, prompts: list[Prompt]
) -> None:
    def scaled(factor: float) -> r0.Supervision:
        rewards = {"redness": lambda images, texts: factor * redness(images, texts), "brightness": brightness}
        return r0.Supervision(rewards, SMOOTH.weights)

    def change(*settings: str) -> float:
        state = with_settings(shared_state, *settings)
        return relative(gradient_of(state, prompts, scaled(100.0)), gradient_of(state, prompts, scaled(1.0)))

    assert change() < 1e-5
    assert change("r0.normalize_gradients=false") > 1.0


def test_regions_weight_the_gradient_of_the_image(shared_state: TrainingState, prompts: list[Prompt]) -> None:
    state = with_settings(shared_state)
    policy = state.policy
    latents = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    height, width = policy.grid

    def gradient(regions: Tensor | None) -> Tensor:
        return r0._reward_gradient(state.config, policy, SMOOTH, latents, prompts, regions)[1]

    plain = gradient(None)
    torch.testing.assert_close(gradient(torch.ones(3, height, width)), plain)
    left = torch.cat([torch.full((3, height, width // 2), 2.0), torch.zeros(3, height, width - width // 2)], dim=2)
    weighted = gradient(left)
    share = weighted[..., : width // 2].norm() / weighted.norm()
    assert share > plain[..., : width // 2].norm() / plain.norm()
    torch.testing.assert_close(weighted + gradient(2.0 - left), 2.0 * plain)


def test_images_that_are_not_finite_are_not_blamed_on_a_reward(
    shared_state: TrainingState, prompts: list[Prompt]
) -> None:
    state = with_settings(shared_state)
    latents = torch.zeros(3, *state.policy.latent_shape)
    latents[2] = torch.nan
    with pytest.raises(NonFiniteError, match=r"samples \[2\]"):
        r0._reward_gradient(state.config, state.policy, SMOOTH, latents, prompts, None)


def test_maps_of_the_steps_shape_the_gradient(shared_state: TrainingState, prompts: list[Prompt]) -> None:
    uniform = gradient_of(with_settings(shared_state), prompts)
    allocated = gradient_of(with_settings(shared_state, "r0.allocate=true"), prompts)
    without = gradient_of(with_settings(shared_state, "r0.allocate=true", "allocation.strength=0"), prompts)
    assert relative(without, uniform) < 1e-3
    assert relative(allocated, uniform) > 1e-2
    kept = gradient_of(with_settings(shared_state, "r0.allocate=true", "r0.checkpointing=false"), prompts)
    assert relative(allocated, kept) < 1e-3


def test_guidance_moves_latents_from_the_prediction_without_to_that_with_the_prompt(
    shared_state: TrainingState, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = with_settings(shared_state, "method=r0_plus", "r0.guidance_weight=0.5", "r0.normalize_gradients=false")
    policy, asked = state.policy, []

    def reference_velocity(self: Policy, latents: Tensor, timestep: Tensor, embeddings: object) -> Tensor:
        asked.append((latents, timestep))
        return torch.full_like(latents, float(len(asked)))

    monkeypatch.setattr(Policy, "reference_velocity", reference_velocity)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    generator, clean = r0._prepare(state.config, policy, prompts, generators)
    got = r0._guidance(state.config, policy, clean, torch.ones_like(clean), generator, generators)
    (latents, timestep), _ = asked
    level = (timestep / policy.pipeline.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
    assert len(set(level.flatten().tolist())) == 3
    predictions = [latents - level * velocity for velocity in (1.0, 2.0)]
    torch.testing.assert_close(got, 0.5 * (predictions[0] - predictions[1]))
    state = with_settings(shared_state, "method=r0_plus", "r0.guidance_weight=0.5")
    relative_to = 3.0 * torch.ones_like(clean)
    scaled = r0._guidance(state.config, policy, clean, relative_to, generator, generators)
    torch.testing.assert_close(scaled.flatten(1).norm(dim=1), 0.5 * relative_to.flatten(1).norm(dim=1))


def test_trajectories_draw_their_own_noise(shared_state: TrainingState, prompts: list[Prompt]) -> None:
    policy = shared_state.policy

    def stds(eta: str) -> Tensor:
        config = load_config("tiny_r0", [*SMALL, f"r0.eta={eta}"])
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        generator, _ = r0._prepare(config, policy, prompts, generators)
        return torch.stack([row.std.expand(3) for row in generator.coefficients])

    levels = policy.schedule(3)[0][1:]
    torch.testing.assert_close(stds("[1, 1]"), levels[:, None].expand(-1, 3))
    assert torch.equal(stds("[0, 0]"), torch.zeros(3, 3))
    shares = stds("[0.2, 0.6]")[:-1] / levels[:-1, None]
    assert len(set(shares[0].tolist())) == 3
    assert bool(((shares > 0.2) & (shares < 0.6)).all())
    torch.testing.assert_close(shares[0], shares[1])


def test_distance_and_penalties_are_those_of_the_whole_matrices(shared_state: TrainingState) -> None:
    model = shared_state.policy.model
    moved = norm = sizes = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A"):
            down, up = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            moved += float((module.scaling["default"] * up @ down).detach().square().sum())
            norm += float(module.base_layer.weight.double().square().sum())
            sizes += 0.5 * float((down.square().sum() + up.square().sum()).detach())
    distance, penalty = r0.regularization(shared_state.policy, "distance")
    assert float(distance) == pytest.approx((moved / norm) ** 0.5, rel=1e-4)
    assert float(penalty) == pytest.approx(moved / norm, rel=1e-4)
    assert float(r0.regularization(shared_state.policy, "lora_norm")[1]) == pytest.approx(sizes, rel=1e-4)


def test_the_weight_of_the_regulariser_follows_its_schedule() -> None:
    def weights(*settings: str) -> list[float]:
        given = ["train.iterations=5", "r0.regularizer_weight=1", "r0.regularizer_final=3", *settings]
        config = load_config("tiny_r0", given)
        return [r0.regularizer_weight(config, iteration) for iteration in range(5)]

    assert weights() == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    assert weights("r0.regularizer_schedule=cosine") == pytest.approx([1.0, 1.2929, 2.0, 2.7071, 3.0], abs=1e-4)
    assert weights("r0.regularizer_final=null") == [1.0] * 5


def test_memory_does_not_grow_with_the_steps(shared_state: TrainingState, prompts: list[Prompt]) -> None:
    def peak(steps: int, checkpointing: bool) -> int:
        state = with_settings(shared_state, f"rollout.steps={steps}", f"r0.checkpointing={checkpointing}".lower())
        return CpuClock().peak_bytes(lambda: r0.backward(state, SMOOTH, prompts, range(3), 0, 1.0))

    assert peak(8, True) < 1.1 * peak(1, True)
    assert peak(8, False) > 3 * peak(1, False)


RUN = ["run.progress=false", "evaluation.prompts=4", "evaluation.interim_prompts=2", "evaluation.pictures=2"]


def test_a_run_logs_what_it_trains_on_and_what_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"with": 0, "without": 0}
    velocity = Policy.velocity
    monkeypatch.setattr(Policy, "velocity", lambda self, *a: (_count(calls), velocity(self, *a))[1])
    settings = [*RUN, f"run.folder={tmp_path}", "method=r0_plus", "rollout.prompts=4", "rollout.samples=1"]
    settings += ["train.iterations=2", "train.batch_size=2", "evaluation.every=5", "evaluation.steps=1"]
    settings += ["r0.gradient_steps=3", "r0.regularizer_weight=0.1"]
    assert main(["tiny_r0", *settings]) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "reward/mean" in record]
    assert len(trained) == 2
    assert trained[0]["train/distance"] == 0.0 and trained[1]["train/distance"] > 0.0
    assert trained[0]["train/reward_clip_score"] == pytest.approx(trained[0]["reward/mean"], rel=1e-5)
    assert {"eval/strict", "eval/graded", "eval/reward"} <= records[0].keys()
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    found = plan(load_config("tiny_r0", settings))
    assert calls["with"] == 2 * found.backward_calls


def _count(calls: dict[str, int]) -> None:
    calls["with" if torch.is_grad_enabled() else "without"] += 1


@pytest.mark.parametrize(
    "settings",
    [["model.dtype=bfloat16"], ["model.lora=null", "train.learning_rate=3e-5"], ["model.gradient_checkpointing=true"]],
    ids=["bfloat16", "all weights", "gradient checkpointing"],
)
def test_other_precisions_and_parameters_have_their_gradient_and_learn(
    settings: list[str], tmp_path: Path, prompts: list[Prompt], another_precision: None
) -> None:
    settings = [*SMALL, *settings, f"run.folder={tmp_path}", "r0.eta=[0, 0.5]"]
    state = build_state(load_config("tiny_r0", settings))
    again = gradient_of(state, prompts)
    state.config = load_config("tiny_r0", [*settings, "r0.checkpointing=false"])
    kept = gradient_of(state, prompts)
    assert relative(again, kept) < (5e-2 if state.config.model.dtype == "bfloat16" else 1e-4)
    if state.config.model.gradient_checkpointing:
        state.policy.model.disable_gradient_checkpointing()
        assert relative(gradient_of(state, prompts), kept) < 1e-5
        state.policy.model.enable_gradient_checkpointing()
    rewards = [r0.reward_gradient_iteration(state, SMOOTH, prompts, 0).rewards.mean() for _ in range(2)]
    assert rewards[1] > rewards[0] and r0.regularization(state.policy, "distance")[0] > 0


def test_an_update_raises_the_reward_of_its_own_samples(shared_state: TrainingState, prompts: list[Prompt]) -> None:
    state = with_settings(shared_state, "r0.eta=[0, 0.5]")
    before = [p.detach().clone() for p in state.policy.trainable().values()]
    rewards = [r0.reward_gradient_iteration(state, SMOOTH, prompts, 0).rewards.mean() for _ in range(3)]
    for parameter, value in zip(state.policy.trainable().values(), before, strict=True):
        parameter.data.copy_(value)
    assert rewards[0] < rewards[1] < rewards[2]


def test_a_run_that_goes_wrong_is_stopped_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*RUN, f"run.folder={tmp_path}", "rollout.prompts=2", "rollout.samples=1", "train.iterations=6"]
    settings += ["rollout.steps=1", "evaluation.steps=1", "r0.stop_distance=0.001", "train.learning_rate=0.01"]
    assert main(["tiny_r0", *settings]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["iterations"] == 2 and "r0.stop_distance" in summary["stopped"]
    assert summary["held_out_prompts"] == 4
    assert "stopped after 2 iterations" in capsys.readouterr().out
    assert main(["tiny_r0", *settings]) == 0
    assert "nothing left to train" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["stopped"] == summary["stopped"]
    assert main(["tiny_r0", *settings, "r0.stop_distance=100", "train.iterations=3"]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["iterations"] == 3


def test_a_run_that_goes_on_ends_in_the_same_weights(tmp_path: Path) -> None:
    def run(folder: str, iterations: int) -> dict[str, Tensor]:
        settings = [*RUN, f"run.folder={tmp_path / folder}", "rollout.prompts=2", "rollout.samples=1"]
        settings += ["rollout.steps=2", "evaluation.steps=1", "evaluation.every=5"]
        # A schedule over the iterations would make a longer run another one.
        assert main(["tiny_r0", *settings, f"train.iterations={iterations}"]) == 0
        return load_file(tmp_path / folder / "adapter" / "pytorch_lora_weights.safetensors")

    first = run("stopped", 1)
    resumed, whole = run("stopped", 2), run("whole", 2)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert any(not torch.equal(resumed[name], first[name]) for name in whole)


def test_a_fallen_score_stops_a_run() -> None:
    def reason(drop: float) -> str | None:
        return r0.stop_reason(load_config("tiny_r0", [f"r0.stop_drop={drop}"]), {}, (0.5, 0.39))

    assert reason(0.12) is None
    assert "0.3900" in str(reason(0.1))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["rollout.steps=0"], "rollout.steps"),
        (["r0.eta=[0.5, 1.5]"], "r0.eta"),
        (["r0.eta=[-0.1, 0.5]"], "r0.eta"),
        (["r0.eta=[0.6, 0.5]"], "r0.eta"),
        (["r0.eta=0.5"], "r0.eta"),
        (["r0.gradient_steps=0"], "r0.gradient_steps"),
        (["r0.gradient_steps=5"], "r0.gradient_steps"),
        (["rollout.guidance_scale=2"], "rollout.guidance_scale"),
        (["rollout.eta=1.5"], "rollout.eta"),
        (["train.kl_weight=0.1"], "train.kl_weight"),
        (["model.sharded=true"], "model.sharded"),
        (["model.lora=null", "r0.regularizer=lora_norm"], "r0.regularizer"),
        (["r0.regularizer_weight=-1"], "r0.regularizer_weight"),
        (["method=star", "rollout.samples=1"], "rollout.samples"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}(\.[01])?: "):
        load_config("tiny_r0", settings)


def test_a_generator_of_four_steps_is_evaluated_with_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: r0\n")

    def steps(*overrides: str) -> tuple[int, int]:
        config = load_config(str(path), overrides)
        return config.rollout.steps, config.evaluation.steps

    assert steps() == (4, 4)
    assert steps("rollout.steps=2") == (2, 2)
    assert steps("evaluation.steps=28") == (4, 28)
    assert steps("method=star") == (10, 20)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("scene_graded", "detector"), ("ocr", "texts"), ("remote", "numbers"), ("builtins:max", "'differentiable'")],
)
def test_a_reward_without_a_gradient_is_refused_with_the_reason(name: str, reason: str) -> None:
    settings = [f"reward.terms={{'{name}': 1}}", "reward.remote.url=http://localhost:1"]
    with pytest.raises(NotDifferentiable, match=rf"^reward.terms: {name} has no gradient.*{reason}"):
        check_differentiable(load_config("tiny_r0", settings).reward)
    assert main(["tiny_r0", *settings, "--dry-run"]) == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, texts: 1.0, "expected a tensor"),
        (lambda images, texts: images.mean(), "expected a tensor"),
        (lambda images, texts: torch.ones(len(images)), "does not depend on the images"),
        (lambda images, texts: torch.ones(len(images), requires_grad=True) * 1, "does not depend on the images"),
        (lambda images, texts: images.mean((1, 2, 3)) * torch.nan, "NaN"),
        (lambda images, texts: images.missing, "AttributeError"),
        (lambda images, texts: FailsBackward.apply(images), "RuntimeError: in its backward"),
    ],
)
def test_a_reward_that_gives_something_else_is_named(function, message: str) -> None:
    with pytest.raises(RewardError, match=rf"reward mine: .*{message}"):
        r0._by_image("mine", function, torch.rand(2, 3, 4, 4, requires_grad=True), ["a", "b"])


def test_a_small_decoder_takes_the_place_of_the_pipelines(
    shared_state: TrainingState, prompts: list[Prompt], tmp_path: Path
) -> None:
    from diffusers import AutoencoderTiny

    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    channels = shared_state.policy.latent_shape[0]
    AutoencoderTiny(latent_channels=channels, **blocks, **widths).save_pretrained(tmp_path / "small")
    state = with_settings(shared_state, f"r0.small_decoder={tmp_path / 'small'}")
    found = r0.load_supervision(state.config, {"redness": redness, "brightness": brightness}, state.policy)
    assert type(found.decoder).__name__ == "AutoencoderTiny"
    small = r0.Supervision(SMOOTH.rewards, SMOOTH.weights, found.decoder)
    assert relative(gradient_of(state, prompts, small), gradient_of(state, prompts)) > 1e-2
    AutoencoderTiny(latent_channels=channels + 1, **blocks, **widths).save_pretrained(tmp_path / "other")
    path = shutil.copytree(tmp_path / "small", tmp_path / "lacking") / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if name != "decoder.layers.0.bias"}, path)
    reasons = {
        "other": "expected a decoder of latents",
        "missing": "no such folder",
        "lacking": "decoder.layers.0.bias",
    }
    for folder, reason in reasons.items():
        state = with_settings(shared_state, f"r0.small_decoder={tmp_path / folder}")
        with pytest.raises(ConfigError, match=rf"^r0.small_decoder: .*{reason}"):
            r0.load_supervision(state.config, SMOOTH.rewards, state.policy)
