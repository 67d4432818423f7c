"""Several processes: the same training as one, equal shares, and no process that waits for one that is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from star_trainer import cli
from star_trainer.config import ConfigError, load_config
from star_trainer.run.checkpoint import load_latest
from star_trainer.run.processes import lost_process
from star_trainer.train import train

from tests.trainer import kill_run, sharded_velocity
from tests.trainer.forked import run_forked

HERE = Path(__file__).parents[1]
SMALL = [
    "run.progress=false",
    "train.iterations=3",
    "train.step_fraction=1.0",
    "train.batch_size=3",
    "train.kl_weight=0.01",
    # Adam moves a weight whose gradient is rounding alone by as much as any other.
    "train.learning_rate=2e-5",
    "rollout.prompts=4",
    "rollout.samples=3",
    "rollout.batch_size=4",
    "rollout.steps=3",
    "rollout.sde_steps=2",
    "evaluation.prompts=5",
    "evaluation.interim_prompts=4",
    "evaluation.steps=2",
    "evaluation.every=2",
    "evaluation.pictures=2",
    "checkpoints.every=1",
    "reward.terms={'reward_for_tests:brightness': 1.0}",
]
# Of a weight after some updates, far below one step: matrices of other sizes are multiplied in another order.
ROUNDING = 3e-6

# What each process keeps of the rollout, and what it is told of the others, with all that can be asked for.
WEIGHTED_IMAGE = ["train.granularity=image", "allocation.temporal=velocity", "allocation.map=geometric"]
WEIGHTED_IMAGE += ["train.objective=dppo", "train.divergence_limit=1e-12"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(HERE))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(before)


def launch(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` as that many processes, as `torchrun` and `accelerate launch` do."""
    path = ":".join([str(HERE), *(entry for entry in sys.path if entry)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def run_two(folder: Path, *overrides: str) -> None:
    codes, printed = run_forked(cli.main, ["tiny", f"run.folder={folder}", *SMALL, *overrides], processes=2)
    assert codes == [0, 0], printed


def run_one(folder: Path, *overrides: str) -> None:
    train(load_config("tiny", [f"run.folder={folder}", *SMALL, *overrides]))


def trained(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("iteration_*"))
    return {
        f"{name}/{key}": tensor
        for name in ("policy", "average", "optimizer")
        for key, tensor in load_file(newest / f"{name}.safetensors").items()
    }


def records(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def two(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    def run_with_torchrun(folder: Path) -> None:
        done = launch("-m", "star_trainer", "tiny", f"run.folder={folder}", *SMALL)
        assert done.returncode == 0, done.stderr[-3000:]

    return made_once("two_processes", run_with_torchrun)


@pytest.mark.exhaustive
def test_two_processes_train_as_one_does(two: Path, tmp_path: Path) -> None:
    run_one(tmp_path)
    one, other = trained(tmp_path), trained(two)
    assert one.keys() == other.keys()
    assert max(float((one[key] - other[key]).abs().max()) for key in one) < ROUNDING
    assert any(tensor.abs().max() > 1e-5 for key, tensor in one.items() if "lora_B" in key)
    for mine, theirs in zip(records(tmp_path), records(two), strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("train/loss", "train/policy_loss", "train/kl", "reward/mean", "reward/std", "eval/reward"):
            assert mine.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), abs=1e-6), name
    assert json.loads((two / "summary.json").read_text())["held_out_prompts"] == 5
    images = [load_file(folder / "base_evaluation.safetensors")["images"] for folder in (tmp_path, two)]
    assert images[0].shape == images[1].shape == (2, 64, 64, 3)
    assert (images[0].int() - images[1].int()).abs().max() <= 1
    newest = max((two / "checkpoints").glob("iteration_*"))
    states = [load_file(newest / f"rng_000{rank}.safetensors")["torch"] for rank in (0, 1)]
    assert not torch.equal(*states), "every process has random numbers of its own"


@pytest.mark.exhaustive
def test_rewards_are_back_propagated_as_in_one_process(tmp_path: Path) -> None:
    # Each update has one sample: one of the two processes has none.
    overrides = ["method=r0_plus", "rollout.samples=1", "rollout.prompts=2", "train.kl_weight=0", "train.iterations=2"]
    overrides += ["reward.terms={clip_score: 1}", "reward.models.clip=tiny", "r0.regularizer_weight=100"]
    run_two(tmp_path / "two", *overrides)
    run_one(tmp_path / "one", *overrides)
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < ROUNDING
    assert any(tensor.abs().max() > 1e-5 for key, tensor in one.items() if "lora_B" in key)
    for mine, theirs in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert mine.keys() == theirs.keys()
        for name in ("reward/mean", "train/reward_clip_score", "train/distance", "train/penalty"):
            assert mine.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-5, abs=1e-6), name
        # Of images, whose rounding a batch of another size can change.
        assert mine.get("eval/reward", 0.0) == pytest.approx(theirs.get("eval/reward", 0.0), abs=0.02)


@pytest.mark.parametrize("objective", [[], WEIGHTED_IMAGE])
def test_unequal_shares_leave_no_process_behind_and_maps_are_exchanged_between_all_groups(
    objective: list[str], tmp_path: Path
) -> None:
    # 15 samples on two processes. Two groups of the five have spread, and the last two updates one sample each.
    overrides = ["method=shuffled", "train.iterations=1", "train.updates=4", "rollout.prompts=5", *objective]
    overrides.append("reward.terms={'reward_for_tests:one_group': 1.0}")
    run_two(tmp_path / "two", *overrides)
    run_one(tmp_path / "one", *overrides)
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < ROUNDING
    assert max(float(tensor.abs().max()) for key, tensor in one.items() if "exp_avg" in key) > 1e-4
    records_of_one, records_of_two = (records(tmp_path / name)[1] for name in ("one", "two"))
    assert records_of_two["reward/groups_without_spread"] == 0.6
    by_step = [name for name in records_of_one if "/step_" in name]
    assert len(by_step) == (6 if objective else 4)
    for name in ("train/divergence", *by_step):
        assert records_of_two[name] == pytest.approx(records_of_one[name], rel=1e-3, abs=1e-9), name


@pytest.mark.exhaustive
def test_a_sharded_transformer_in_bfloat16_sees_the_exact_timestep(tmp_path: Path) -> None:
    codes, printed = run_forked(sharded_velocity.main, [str(tmp_path)], processes=2)
    assert codes == [0, 0], printed
    for output in printed:
        (line,) = [line.split() for line in output.splitlines() if line.startswith("difference")]
        assert float(line[1]) == 0.0 < float(line[-1])


@pytest.mark.exhaustive
def test_a_fully_trained_sharded_transformer_is_exported_whole(tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    overrides = ["model.sharded=true", "model.lora=null", "train.kl_weight=0", "train.iterations=1"]
    run_two(tmp_path, *overrides, "model.gradient_checkpointing=true", "rollout.keep_on_host=true")
    exported = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
    averages = load_file(max((tmp_path / "checkpoints").glob("iteration_*")) / "average.safetensors")
    assert averages.keys() <= exported.keys()
    assert all(torch.equal(exported[key], averages[key]) for key in averages)


@pytest.mark.exhaustive
def test_a_killed_process_ends_the_run_which_goes_on_from_its_checkpoint_sharded_as_copied(
    two: Path, tmp_path: Path
) -> None:
    sharded = "model.sharded=true"
    ended = launch(str(HERE / "kill_run.py"), "rollout", str(tmp_path), *SMALL, sharded)
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr or "another process of this run is gone" in ended.stderr
    assert not (tmp_path / "summary.json").exists()
    assert list((tmp_path / "checkpoints").glob("iteration_*/manifest.json"))
    run_two(tmp_path, sharded)
    copied, resumed = trained(two), trained(tmp_path)
    assert copied.keys() == resumed.keys()
    assert max(float((copied[key] - resumed[key]).abs().max()) for key in copied) < ROUNDING
    assert records(tmp_path)[-1]["iteration"] == 3
    adapters = [load_file(folder / "adapter" / "pytorch_lora_weights.safetensors") for folder in (two, tmp_path)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.allclose(adapters[0][key], adapters[1][key], atol=1e-6) for key in adapters[0])


@pytest.mark.exhaustive
def test_a_reward_that_fails_in_one_process_ends_all_with_a_checkpoint(tmp_path: Path) -> None:
    failing = ["reward.terms={'reward_for_tests:fails_in_the_last_process': 1.0}"]
    codes, printed = run_forked(cli.main, ["tiny", f"run.folder={tmp_path}", *SMALL, *failing], processes=2)
    assert 0 not in codes
    assert any("process 1 of 2 cannot go on" in output for output in printed), printed
    assert "the reward is gone" in printed[1] and any("iterations are saved" in output for output in printed), printed
    assert list((tmp_path / "checkpoints").glob("iteration_*/manifest.json"))


@pytest.mark.parametrize(
    ("point", "code", "said"),
    [
        ("signal", 128 + signal.SIGTERM, "stopped by SIGTERM. 2 iterations are saved"),
        ("memory", 2, "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)"),
    ],
)
def test_what_ends_one_process_ends_all_and_what_was_trained_is_saved(
    point: str, code: int, said: str, tmp_path: Path
) -> None:
    # Each process has eight passes in the first two iterations.
    options = ["train.batch_size=6", "checkpoints.every=100", "evaluation.every=100"]
    codes, printed = run_forked(kill_run.main, [point, str(tmp_path), *SMALL, *options], processes=2)
    assert codes == [code, code], printed
    assert said in printed[1], printed
    assert ("another process of this run is gone" in printed[0]) == (point == "memory"), printed
    found = load_latest(tmp_path / "checkpoints")
    assert found is not None and found.iteration == 2
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


def test_a_reward_that_hangs_in_one_process_ends_all_with_a_checkpoint(tmp_path: Path) -> None:
    hanging = ["reward.terms={'reward_for_tests:hangs_in_the_last_process': 1.0}", "reward.timeout=5"]
    start = time.monotonic()
    codes, printed = run_forked(cli.main, ["tiny", f"run.folder={tmp_path}", *SMALL, *hanging], processes=2)
    assert codes == [2, 2] and time.monotonic() - start < 250, printed
    assert "no answer within 5 s (reward.timeout). 1 iterations are saved" in printed[1], printed
    assert load_latest(tmp_path / "checkpoints").iteration == 1


def test_one_process_has_nothing_to_spread_its_weights_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.sharded"):
        run_one(tmp_path, "model.sharded=true")


def test_only_failures_of_communication_count_as_a_lost_process() -> None:
    assert lost_process(RuntimeError("[../third_party/gloo/pair.cc:534] Connection closed by peer"))
    assert lost_process(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not lost_process(RuntimeError("out of memory"))
    assert not lost_process(ValueError("gloo"))
