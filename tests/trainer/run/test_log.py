"""What a run says: the line of an iteration, with where its time went, and when its page is written."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from star_trainer.run.log import Iteration, RunLog, _update

MEASURED = {"updates": 2.0, "clip_fraction": 0.25, "gradient_norm": 0.5}


def test_an_update_shows_what_it_measured() -> None:
    assert _update(0.5, MEASURED) == "no spread  50% | clip 25.00% | grad 5.00e-01"
    assert _update(0.5, MEASURED | {"kl": 0.001}) == "no spread  50% | clip 25.00% | kl 1.00e-03 | grad 5.00e-01"
    assert _update(None, {"distance": 0.03, "gradient_norm": 0.5}) == "distance 3.00e-02 | grad 5.00e-01"


def test_without_spread_there_is_nothing_to_learn_from() -> None:
    line = _update(1.0, {"updates": 0.0, "skipped_updates": 0.0})
    assert "no group with spread" in line and "nan" not in line


def test_skipped_updates_are_no_lack_of_spread() -> None:
    line = _update(0.5, {"updates": 0.0, "skipped_updates": 2.0})
    assert "every update skipped" in line and "nan" not in line


def test_the_hidden_share_is_of_the_seconds_that_the_reward_ran_while_sampling_went_on() -> None:
    records: list[dict[str, float]] = []
    state = SimpleNamespace(iteration=1, config=SimpleNamespace(rollout=SimpleNamespace(samples=2)))
    log = SimpleNamespace(
        state=state, _record=records.append, _bar=SimpleNamespace(update=lambda n: None), say=lambda line: None
    )
    log._attention = None
    # What was waited for includes a second that the reward did not run in.
    seconds = {"rollout": 5.0, "reward": 4.0, "reward_hidden": 3.0, "reward_wait": 2.0, "update": 1.0}
    RunLog.iteration(log, Iteration(np.zeros(4), seconds, MEASURED))  # type: ignore[arg-type]
    assert records[0]["seconds/reward_hidden_fraction"] == 0.75


def test_a_page_is_written_once_a_minute_and_of_the_last_evaluation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    pages = iter(range(9))
    state = SimpleNamespace(config=None, iteration=3, policy=None)
    log: Any = SimpleNamespace(state=state, folder=tmp_path, history=[], say=said.append, _reported=time.monotonic())
    monkeypatch.setattr("star_trainer.run.log.run_page", lambda *_: str(next(pages)).encode())
    evaluated = SimpleNamespace(denoising=lambda policy: None)

    def report(seen: Any, *, last: bool = False) -> str:
        log._unreported = seen
        RunLog.report(log, None, last=last)  # type: ignore[arg-type]
        page = tmp_path / "report.html"
        return page.read_text() if page.is_file() else ""

    assert report(evaluated) == ""  # the run has just begun
    log._reported -= 61.0
    assert report(evaluated) == report(evaluated) == "0"
    assert report(evaluated, last=True) == "1" and log._unreported is None
    # Nothing was evaluated since, as where a run that is done is started again.
    assert report(None, last=True) == "1"
    # Too large a picture for the memory ends no run.
    failing = SimpleNamespace(denoising=lambda policy: torch.empty(1 << 60))
    assert report(failing, last=True) == "1" and "could not be written: RuntimeError" in said[0]
