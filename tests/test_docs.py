"""The README and the docs: their code runs as it stands, their commands are understood, their links lead somewhere.

The guide to one's own loop has a test of its own, tests/test_integration_guide.py.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model_state_dict
from star_trainer.config import load_config
from star_trainer.config.paths import TINY_PIPELINE

from tests.trainer.families.small_pipelines import PIPELINES

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
MadeOnce = Callable[[str, Callable[[Path], None]], Path]
pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


def commands(page: Path) -> list[list[str]]:
    """The words of each command of ours on a page: the command, and its arguments."""
    ours = {script.name for script in entry_points(group="console_scripts") if script.module.startswith("star_trainer")}
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8").replace("\\\n", " "), flags=re.S)
    # Between backticks a name alone or with an option is no command, and an ellipsis stands for what is left out.
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    lines = [
        *re.findall(r"^ {4}(\S.*)$", text, re.M),
        *(code for code in inline if re.match(r"\S+ [^-]|python -m", code)),
    ]
    found = []
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if len(words) > 1 and not any("..." in word or "…" in word for word in words):
            name = words[0].removeprefix(".venv/bin/")
            if name in ours or (name == "python" and ("bench" in words[1] or "star_trainer" in words[2:3])):
                found.append([name, *words[1:]])
    return found


COMMANDS = sorted({(page.name, *words) for page in PAGES for words in commands(page)})


class Understood(Exception):
    """Raised instead of doing what a command says."""


@pytest.mark.parametrize(("page", "command"), [(page, words) for page, *words in COMMANDS], ids=str)
def test_commands_are_understood(page: str, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their options are known, and where they name a preset, its keys are."""
    name, *arguments = command
    if name != "python":
        (script,) = entry_points(group="console_scripts", name=name)
        module = script.module
    elif arguments[0] == "-m":
        _, module, *arguments = arguments
    else:
        path, *arguments = arguments
        module = ".".join(Path(path).with_suffix("").parts)

    def parse(parser: argparse.ArgumentParser, given: list[str] | None = None, *_: Any) -> None:
        options, unknown = parser.parse_known_args(arguments if given is None else given)
        raise Understood(options, unknown)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [name, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse)
    with pytest.raises(Understood) as understood:
        importlib.import_module(module).main()
    options, unknown = understood.value.args
    assert not [word for word in unknown if word.startswith("-")]
    overrides = [*getattr(options, "overrides", []), *unknown]
    source = getattr(options, "config", None)
    if source and not source.startswith("runs/") and Path(source).suffix != ".yaml":
        load_config(source, overrides)


def test_commands_are_found() -> None:
    assert {name for _, name, *_ in COMMANDS} > {"star-train", "star-ablate", "star-eval", "star-units", "python"}


def test_the_example_runs_as_it_stands() -> None:
    (code,) = blocks("README.md")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(TINY_PIPELINE, torch_dtype=torch.float32)
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


class Stored(dict[str, Path]):
    """Names on the hub and folders of runs as the docs have them, and what stands in for each here."""

    def __init__(self, pipeline: Path, kind: Any, folder: Path) -> None:
        pipe = kind.from_pretrained(pipeline)
        part = "unet" if hasattr(pipe, "unet") else "transformer"
        model = getattr(pipe, part)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        kind.save_lora_weights(folder, **{f"{part}_lora_layers": get_peft_model_state_dict(model)})
        self.pipeline, self.adapter = pipeline, folder

    def run(self, code: str, **scope: Any) -> dict[str, Any]:
        code = re.sub(r'"runs/[^"]*/adapter"', repr(str(self.adapter)), code)
        code = re.sub(r'"runs/[^"]*/unet"', repr(str(self.pipeline / "unet")), code)
        code = re.sub(r'from_pretrained\("[^"]+"', f"from_pretrained({str(self.pipeline)!r}", code)
        exec(code, {**vars(diffusers), "torch": torch} | scope, scope)
        return scope


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a user's machine: where the hub is said to be out of reach, diffusers wants the name of each file."""
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_adapters_load_as_the_guides_say(tmp_path: Path, made_once: MadeOnce) -> None:
    sd3 = Stored(TINY_PIPELINE, diffusers.StableDiffusion3Pipeline, tmp_path / "sd3")
    (training,) = blocks("docs/training.md")
    assert sd3.run(training)["pipe"].get_list_adapters() == {"transformer": ["default_0"]}

    few_steps, trailing, _ = blocks("docs/r0.md")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(TINY_PIPELINE, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = sd3.run(few_steps, pipe=pipe, prompt="a photo of a red circle")["image"]
    assert image.size == (64, 64) and pipe.get_list_adapters()

    folder = made_once("pipeline_sd15", PIPELINES["sd15"].save)
    sd15 = Stored(folder, diffusers.StableDiffusionPipeline, tmp_path / "sd15")
    unets, whole = blocks("docs/models.md")
    pipe = sd15.run(unets)["pipe"]
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler) and pipe.get_list_adapters() == {"unet": ["default_0"]}
    found = sd15.run(whole)
    assert found["pipe"].unet is found["unet"]
    pipe = sd15.run(trailing, pipe=pipe)["pipe"]
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_the_reward_of_one_s_own_is_the_same_with_a_gradient() -> None:
    *_, code = blocks("docs/r0.md")
    scope: dict[str, Any] = {}
    exec(code, scope)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    as_tensor = torch.from_numpy(images).permute(0, 3, 1, 2).double().div(255).requires_grad_()
    values = scope["redness"].differentiable(as_tensor, ["a", "b"])
    np.testing.assert_allclose(scope["redness"](images, [SimpleNamespace(text="a", metadata={})] * 2), values.detach())
    values.sum().backward()
    assert as_tensor.grad[:, 0].min() > 0


def test_the_reward_of_the_guide_is_a_configuration(tmp_path: Path) -> None:
    (code,) = blocks("docs/rewards.md", "yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump({"prompts": {"source": "scenes"}, "model": {"pipeline": "x"}} | yaml.safe_load(code))
    )
    config = load_config(str(path), [])
    assert config.reward.terms == {"pickscore": 0.038, "ocr": 1.0, "aesthetic": 0.0}
    assert config.reward.gates["pickscore"] == {"ocr": 0.8, "aesthetic": 4.5}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page: Path) -> None:
    text = page.read_text()
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_block_of_code_is_run() -> None:
    """A block that is added needs a test above, or in tests/test_integration_guide.py for the guide."""
    found = {page.name: page.read_text().count("```") // 2 for page in PAGES if "```" in page.read_text()}
    assert found == {"README.md": 1, "integration.md": 1, "models.md": 2, "r0.md": 3, "rewards.md": 1, "training.md": 1}


def test_files_that_contributors_are_sent_to_are_there() -> None:
    paths = re.findall(r"`([\w./]+/[\w.]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_lines_are_short() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(readme) <= 110 and max(map(len, readme)) <= 100
    long = []
    for page in PAGES:
        # But for tables, commands, links and code.
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        prose = [line for line in text.splitlines() if not re.match(r"\||    |.*\]\(|\[", line)]
        long += [f"{page.name}: {line}" for line in prose if len(line) > 100]
    assert long == []
