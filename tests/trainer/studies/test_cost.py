"""star-cost: what it compares is the same work, operations are those of a formula, and ratios are to uniform."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from star_trainer.config import load_config
from star_trainer.studies import timing
from star_trainer.studies.cost import cases, cli, flops, plot
from star_trainer.studies.cost import parts as parts_module
from star_trainer.studies.cost.cases import Arm, Case, attention_of, layer_inputs, load_case, roll_out, shape_case
from star_trainer.studies.cost.flops import Counts, count
from star_trainer.studies.cost.results import tables

import star_kernels as sk
from star_kernels.recorder import recorder

SMALL = [
    "run.progress=false",
    "rollout.prompts=2",
    "rollout.samples=2",
    "rollout.batch_size=4",
    "rollout.steps=2",
    "rollout.sde_steps=1",
    "train.batch_size=4",
]


class ScriptedClock:
    """The second function that it meets takes twice as long as the first, the third four times, and so on."""

    shortest_round = 0.0

    def __init__(self) -> None:
        self.order: list[Callable[[], object]] = []

    def sample(self, function: Callable[[], object], calls: int, host_seconds: float = 0.0) -> timing.Sample:
        if function not in self.order:
            self.order.append(function)
        return timing.Sample(2.0 ** self.order.index(function))

    def peak_bytes(self, function: Callable[[], object]) -> int:
        function()
        return 1000 + self.order.index(function)


@pytest.fixture(autouse=True)
def no_accelerator_left() -> None:
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def shapes() -> Case:
    return shape_case(load_config("tiny", SMALL))


def run(tmp_path: Path, *arguments: str) -> dict:
    assert cli.main(["tiny", *SMALL, "--folder", str(tmp_path), *arguments]) == 0
    return json.loads((tmp_path / "cost.json").read_text())


def test_ratios_are_to_uniform_of_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "clock_for", lambda _: ScriptedClock())
    # Counting takes as long as all the rest, and has tests of its own.
    for module in (flops, parts_module):
        monkeypatch.setattr(module, "count", lambda _: 1_000_000)
    parts = run(tmp_path)["parts"]
    assert list(parts) == list(cli.PARTS)
    names = [group["name"] for part in parts.values() for group in part["groups"]]
    assert names == ["attention", "allocation map", "policy loss", "rollout step", "update", "iteration"]
    for part in parts.values():
        assert part["command"].startswith("star-cost tiny ")
        assert {"device", "torch", "threads", "commit"} <= part["environment"].keys()
        assert part["config"]["rollout"]["prompts"] == 2
        for group in part["groups"]:
            place = {f"{m['method']}, {m['variant']}": i for i, m in enumerate(group["members"])}
            for name, member in zip(place, group["members"], strict=True):
                assert (member["flops"] is None) != (member["bytes"] is None)
                assert member["seconds"].keys() == {"median", "q1", "q3", "low", "high"}
                assert member["peak_bytes"] >= 1000 and member["rounds"] >= 5
                if member["baseline"] is None:
                    assert group["name"] == "allocation map" and member["ratio"] is None
                    continue
                assert member["baseline"].startswith("uniform, ")
                assert member["ratio"]["median"] == 2.0 ** (place[name] - place[member["baseline"]])
    (step,) = parts["rollout"]["groups"]
    first, second = step["members"][:2]
    assert second["seconds"]["median"] == 2.0 * first["seconds"]["median"]
    # A call makes several steps, and what is said is of one.
    assert step["members"][0]["seconds"]["median"] * cases.ROLLOUT_STEPS in {2.0**power for power in range(40)}
    assert first["flops"] == 1_000_000
    table = capsys.readouterr().out
    assert "| rollout step: 4 samples | time | against uniform | peak memory | work |" in table
    assert "| star, materialised |" in table
    assert plot.main([str(tmp_path / "cost.json"), str(tmp_path / "again.png")]) == 0
    for name in ("cost.png", "again.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "cost.md").read_text().strip() in table


def test_objectives_that_compare_with_the_old_velocity_are_measured_and_counted_too(
    shapes: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = ["train.objective=guard", "allocation.temporal=velocity"]
    counted = Counts(shape_case(load_config("tiny", [*SMALL, *guard]))).update(Arm("star"))
    assert counted == Counts(shapes).update(Arm("star")), "the loss is element-wise"
    monkeypatch.setattr(timing, "clock_for", lambda _: ScriptedClock())
    for module in (flops, parts_module):
        monkeypatch.setattr(module, "count", lambda _: 1_000_000)
    moved = {
        name: run(tmp_path / name, "--parts", "operations,update", *settings)["parts"]["operations"]["groups"][2]
        for name, settings in {"clip": [], "guard": guard}.items()
    }
    assert moved["guard"]["members"][0]["bytes"] > moved["clip"]["members"][0]["bytes"]


@pytest.mark.parametrize(
    ("flops", "shown"),
    [(4_000, "0.004 MFLOP"), (72.25e12, "72.25 TFLOP"), (199.3e15, "199.3 PFLOP"), (2e19, "2e+04 PFLOP")],
)
def test_operations_are_shown_in_a_unit_of_their_size(flops: float, shown: str) -> None:
    member = {"method": "star", "variant": "fused", "baseline": None, "flops": flops, "bytes": None}
    group = {"name": "update", "what": "8 samples", "members": [member]}
    assert f"| star, fused |  |  |  | {shown} |" in tables({"parts": {"update": {"groups": [group]}}})


def test_parts_measured_later_join_those_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path, "--flops-only", "--parts", "rollout")
    both = run(tmp_path, "--flops-only", "--parts", "operations")
    assert both["parts"]["rollout"] == first["parts"]["rollout"]
    assert list(both["parts"]) == ["operations", "rollout"]
    assert "seconds" not in both["parts"]["operations"]["groups"][0]["members"][0]
    (tmp_path / "cost.json").write_text("{}")
    assert cli.main(["tiny", *SMALL, "--folder", str(tmp_path), "--flops-only", "--parts", "rollout"]) == 2
    assert "cost.json: expected results of star-cost in format 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tiny", "--parts", "rollouts"],
            "--parts: expected some of operations, rollout, update, iteration, got rollouts",
        ),
        (["tiny", "--parts", ","], "--parts: expected some of"),
        (["tiny", "--seconds", "0"], "--seconds: expected more than 0, got 0.0"),
        (["tyny"], "did you mean tiny?"),
        (["tiny", "rollout.promts=3"], "rollout.promts: unknown key"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_large_model_is_not_timed_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_LARGEST_ON_CPU", 0.1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tiny", *SMALL, "--folder", str(tmp_path / "new")]) == 2
    assert "tiny: expected a GPU to time a transformer of" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("units", [None, 3])
def test_operations_of_attention_are_those_of_the_formula(units: int | None) -> None:
    batch, heads, image, text, head_dim = 2, 3, 20, 7, 16
    query, key, value = (torch.empty(batch, heads, image + text, head_dim, device="meta") for _ in range(3))
    options = {} if units is None else {"unit_weights": torch.empty(1, text, units, device="meta"), "rows": (1, 2)}
    expected = 2 * (2 * batch * heads * (image + text) ** 2 * head_dim)
    expected += 2 * heads * image * text * (units or 0)
    assert count(lambda: sk.joint_attention(query, key, value, num_image_tokens=image, **options)) == expected

    def forward_and_backward() -> None:
        tensors = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        sk.joint_attention(*tensors, num_image_tokens=image, **options)[0].sum().backward()

    backward = 5 * (2 * batch * heads * (image + text) ** 2 * head_dim)
    assert count(forward_and_backward) == expected + backward


def test_capture_adds_its_products_to_a_rollout_step_and_nothing_to_an_update(shapes: Case) -> None:
    counts, layer = Counts(shapes), layer_inputs(shapes)
    batch, heads, tokens, head_dim = layer.query.shape
    image, units = layer.num_image_tokens, layer.unit_weights.shape[2]
    layers, text = shapes.state.policy.model.config.num_layers, tokens - image
    uniform = counts.rollout_step(Arm("uniform"))
    assert counts.rollout_step(Arm("star")) - uniform == layers * 2 * batch * heads * image * text * units
    again = layers * 2 * batch * image * text * (heads * head_dim + units)
    assert counts.rollout_step(Arm("star", "unfused")) - uniform == again
    assert counts.update(Arm("star")) == counts.update(Arm("uniform"))


def test_every_variant_makes_the_same_maps() -> None:
    case = load_case(load_config("tiny", SMALL), torch.device("cpu"))
    fused, unfused, materialised = (
        roll_out(case, Arm("star", variant), 2)() for variant in ("fused", "unfused", "materialised")
    )
    assert fused.weights is not None and fused.weights.std() > 0.01
    for other in (unfused, materialised):
        torch.testing.assert_close(other.weights, fused.weights, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(other.latents, fused.latents, rtol=1e-3, atol=1e-4)
        assert not torch.equal(other.weights, fused.weights)
    uniform = roll_out(case, Arm("uniform"), 2)()
    assert uniform.weights is None


def test_arms_take_their_ratios_where_their_names_say() -> None:
    case = load_case(load_config("tiny", SMALL), torch.device("cpu"))
    where = {arm: case.of(Arm(arm)).config.train.granularity for arm in ("uniform", "uniform_position", "star")}
    assert where == {"uniform": "image", "uniform_position": "position", "star": "image"}


def test_the_kernels_are_back_after_another_variant() -> None:
    fused = recorder.joint_attention
    with pytest.raises(KeyError), attention_of("materialised"):
        assert recorder.joint_attention is not fused
        raise KeyError
    assert recorder.joint_attention is fused
