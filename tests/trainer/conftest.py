"""The browser that pages are looked at in, and where runs leave none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on PATH")
    from playwright.sync_api import sync_playwright

    quiet = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=found,
            args=["--no-sandbox", "--disable-component-update", *(f"--{flag}" for flag in quiet)],
        )
        yield running
        running.close()


@pytest.fixture(autouse=True)
def _nothing_drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of these rooms' tests leave no page and no curves, half of their time; test_train.py looks at those."""
    if request.path.parent.name in ("algorithms", "families", "prompts", "rewards", "run"):
        if request.path.name != "test_log.py":
            monkeypatch.setattr("star_trainer.run.log.write_page", lambda *_: "")
        monkeypatch.setattr("star_trainer.run.pictures.plot_curves", lambda *_: None)
