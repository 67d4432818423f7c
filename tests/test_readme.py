"""The README: its example runs as it stands, and what it links to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def test_the_example_runs_as_it_stands() -> None:
    from diffusers import StableDiffusion3Pipeline
    from star_trainer.config.paths import TINY_PIPELINE

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    pipe = StableDiffusion3Pipeline.from_pretrained(TINY_PIPELINE, torch_dtype=torch.float32)
    prompts = ["a photo of a red circle left of a blue square"] * 2
    text, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    pipe.scheduler.set_timesteps(10)
    sigmas = pipe.scheduler.sigmas
    scope = {
        "pipe": pipe,
        "prompts": prompts,
        "text": text.detach(),
        "pooled": pooled.detach(),
        "x": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)),
        "timestep": pipe.scheduler.timesteps[:1].expand(2),
        "sigma": sigmas[0],
        "sigma_next": sigmas[1],
        "sigmas": sigmas,
        "advantage": torch.tensor([1.0, -1.0]),
    }
    exec(code, scope)
    assert scope["w"].shape == (2, 8, 8)
    torch.testing.assert_close(scope["w"].mean((1, 2)), torch.ones(2), rtol=0, atol=1e-6)
    # The policy has not changed since the rollout.
    torch.testing.assert_close(scope["result"].metrics["ratio_mean"], torch.tensor(1.0), rtol=0, atol=1e-5)
    assert any(parameter.grad is not None for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page: Path) -> None:
    text = page.read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_files_that_contributors_are_sent_to_are_there() -> None:
    paths = re.findall(r"`([\w./]+/[\w.]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []
