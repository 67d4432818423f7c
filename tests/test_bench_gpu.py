"""The one-command GPU run at toy size: every section runs here, so that its first minute on a GPU is not its first."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_attention, gpu_latents, harness
from bench.gpu_report import Report, relative_error


def run(tmp_path: Path, *arguments: str, backend: str = "auto") -> tuple[int, dict[str, Any]]:
    out = tmp_path / "results.json"
    code = gpu.main(["--toy", "--backend", backend, "--out", str(out), *arguments])
    return code, harness.load_results(out)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    deadline = time.monotonic() + 60
    return Report("made up", tmp_path / "part.json", torch.device("cpu"), toy=True, backend="auto", deadline=deadline)


@pytest.mark.exhaustive
def test_every_section_runs_and_every_check_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, content = run(tmp_path, "--in-process", backend="triton")
    shown = capsys.readouterr().out
    assert code == 0, shown
    groups, sections = content["groups"], content["sections"]
    assert list(sections) == list(gpu.SHARES)
    assert {part["status"] for part in sections.values()} == {"ok"}
    assert len(sections["attention correctness"]["checks"]) > 100
    assert len(sections["latents"]["checks"]) > 10
    for kind in ("forward, S", "backward, S", "loss", "transition", "allocation", "rollout", "update"):
        assert any(kind in group["name"] for group in groups), kind
    forward = next(group for group in groups if "forward, S" in group["name"])
    assert forward["baseline"].startswith("SDPA ")
    assert all(member["rates"]["TFLOP/s"] > 0 for member in forward["members"])
    assert "time / baseline" in shown


@pytest.mark.exhaustive
def test_a_section_in_a_process_of_its_own_hands_its_findings_over(tmp_path: Path) -> None:
    code, content = run(tmp_path, "--sections", "attention correctness")
    assert code == 0
    assert content["sections"]["attention correctness"]["checks"]


def test_what_fails_is_kept_with_its_traceback_and_the_rest_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("made to fail")

    monkeypatch.setattr(gpu_attention, "speed", broken)
    monkeypatch.setattr(gpu_latents, "_check_loss", broken)
    monkeypatch.setattr(gpu_latents, "_times", lambda *_: None)
    code, content = run(tmp_path, "--in-process", "--sections", "attention speed", "latents")
    assert code == 1
    speed, latents = content["sections"]["attention speed"], content["sections"]["latents"]
    assert "made to fail" in speed["failures"][0]["traceback"]
    assert "made to fail" in latents["failures"][0]["traceback"]
    assert any("transition" in check["what"] for check in latents["checks"])
    assert [group["name"] for group in content["groups"]] == ["copy"]
    assert "FAILED: the whole section" in capsys.readouterr().out


def test_a_process_that_dies_or_hangs_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    report.check("kept", 0.0, 1.0)

    def die(name: str, options: object, path: Path, seconds: float) -> None:
        path.write_text(report.path.read_text())
        gpu.run_apart([sys.executable, "-c", "import os; os.abort()"], seconds)

    monkeypatch.setattr(gpu, "run_section_apart", die)
    code, content = run(tmp_path, "--sections", "latents", "model")
    assert code == 1
    for part in content["sections"].values():
        assert part["status"] == "cut off"
        assert part["checks"][0]["what"] == "kept"

    gpu.run_apart([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    assert "killed after" in capsys.readouterr().out


def test_a_spent_budget_leaves_sections_out(tmp_path: Path) -> None:
    code, content = run(tmp_path, "--in-process", "--budget", "0")
    assert code == 1
    assert {part["status"] for part in content["sections"].values()} == {"left out"}


def test_a_report_tells_good_from_bad(report: Report) -> None:
    report.check("within", 1e-6, 1e-5)
    assert not report.ok
    report.finish()
    assert report.ok
    report.check("not a number", math.nan, 1e-5)
    report.check_equal("the same", torch.ones(2), torch.zeros(2))
    assert not report.ok
    part = json.loads(report.path.read_text())
    assert part["status"] == "failed"
    assert [check["ok"] for check in part["checks"]] == [True, False, False]
    assert part["checks"][1]["error"] is None


def test_memory_that_does_not_suffice_is_no_failure(report: Report) -> None:
    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand so on")

    group = report.measure("g", [harness.Member("huge", too_much), harness.Member("small", lambda: None)])
    report.finish()
    assert group is not None
    assert [measurement.name for measurement in group.measurements] == ["small"]
    assert report.left_out == [{"what": "g: huge", "reason": "CUDA out of memory. Tried to allocate"}]
    assert report.ok


def test_wrong_kernels_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report) -> None:
    right = gpu_attention.cases.fused

    def wrong(*arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, mass = right(*arguments, **options)
        return out * 1.02, None if mass is None else mass * 1.01

    monkeypatch.setattr(gpu_attention.cases, "fused", wrong)
    shape = gpu_attention.shapes(report)[0]
    gpu_attention._check_shape(report, shape, torch.bfloat16, "S")
    bad = {check["what"] for check in report.checks if not check["ok"]}
    assert {"S, output with capture, sample 0", "S, output without, sample 1", "S, mass, sample 1"} <= bad


def test_relative_error_sees_a_nan() -> None:
    assert relative_error(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.0])) == pytest.approx(0.05)
    assert math.isnan(relative_error(torch.tensor([math.nan, 2.0]), torch.tensor([1.0, 2.0])))
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0


def test_without_a_gpu_full_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--toy" in capsys.readouterr().err
