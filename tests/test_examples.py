"""The examples: each runs as a user starts it, on the small pipeline, and is short."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> dict[str, Any]:
    """Run an example as ``python examples/NAME ARGUMENTS``; returns its names."""
    path = str(EXAMPLES / name)
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    state = torch.get_rng_state()
    try:
        return runpy.run_path(path, run_name="__main__")
    finally:
        torch.set_rng_state(state)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_they_are_short_and_use_what_is_public(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    assert "star_kernels._" not in text and "star_kernels." not in text.replace("import star_kernels as sk", "")


def test_own_loop_trains_an_adapter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    run(monkeypatch, "own_loop.py", "--iterations", "1", "--out", str(tmp_path))
    assert capsys.readouterr().out.startswith("iteration 1: reward 0.")
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    # The second matrix of an adapter begins at zero: what is there has been learnt.
    assert any(weights[name].abs().max() > 0 for name in weights if "lora_B" in name)
    assert all(name.startswith("transformer.") for name in weights)


def test_flow_grpo_s_loop_moves_away_from_its_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "flow_grpo.py", "--iterations", "1")
    line = capsys.readouterr().out
    assert line.startswith("iteration 1: reward 0.")
    # The second batch is trained on after an update by the first one.
    assert 0.0 < float(line.partition("KL ")[2]) < 1e-3


def test_attention_maps_find_an_object_where_it_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from PIL import Image

    out = tmp_path / "maps.png"
    names = run(monkeypatch, "attention_maps.py", "a photo of a red circle", "--steps", "8", "--out", str(out))
    assert Image.open(out).size[0] > 800
    pipe = names["DiffusionPipeline"].from_pretrained(names["TINY_PIPELINE"], torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 8, "generator": generator}
    picture, maps = names["sample"](pipe, "a photo of a red circle", ["circle", "photo"], slice(None), **options)
    assert list(maps) == ["circle", "photo"] and maps["circle"].shape == (8, 8)
    assert maps["circle"].mean() == pytest.approx(1.0, abs=1e-5)
    red, green, blue = picture.resize((8, 8)).split()
    redness = torch.tensor(list(red.tobytes())).float() - torch.tensor(list(green.tobytes())).float()
    inside = (redness.view(8, 8) > redness.max() / 2).numpy()
    assert maps["circle"][inside].mean() > 1.5 * maps["circle"][~inside].mean()
    with pytest.raises(SystemExit, match="--units: expected words of the prompt"):
        names["sample"](pipe, "a photo of a red circle", ["square"], slice(None))
