"""The line of an iteration says what the update measured, or why there was none, and where its time went."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
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
