"""star-explore: maps and advantages against those that training computes, bad input, and the page in a browser."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from star_trainer.config import ConfigError
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardError, load_reward
from star_trainer.run.randomness import stream
from star_trainer.sampling import denoise, text_units
from star_trainer.studies.explore.cli import _parser, load, main, settings
from star_trainer.studies.explore.sampling import Explorer, Group
from star_trainer.studies.explore.view import view

from tests.trainer.families.small_pipelines import PIPELINES

PROMPT = "a red circle and a blue square"
UNITS = ["red circle", "blue square"]
OBJECTS = [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}]
SCENE = Prompt(PROMPT, {"include": OBJECTS})
RUN = Path(__file__).parents[1] / "run_of_before"


@pytest.fixture(autouse=True)
def _afresh() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def explorer_of(*arguments: str) -> Explorer:
    options = _parser().parse_intermixed_args(arguments)
    return load(settings(options), options)


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    AcceleratorState._reset_state(reset_partial_state=True)
    explorer = explorer_of("tiny", "--steps", "3", "--reward", "pickscore", "rollout.batch_size=2")
    explorer.prompts = [SCENE]
    return explorer


@pytest.fixture(scope="module")
def group(explorer: Explorer) -> Group:
    return explorer.sample(PROMPT, UNITS, seed=5, count=3)


# Joint attention; cross-attention at two resolutions, whose second is that of all layers; a text after its image.
@pytest.mark.parametrize("name", ["tiny", "sd15", "sdxl", "z_image"])
def test_maps_are_those_that_training_records_of_the_layers_and_units(
    name: str, made_once: Callable[[str, Callable[[Path], None]], Path]
) -> None:
    guided = ["--guidance", "2.0", "--steps", "2", "allocation.sharpness=2.0"]
    if name == "tiny":
        explorer = explorer_of("tiny", *guided)
    else:
        folder = made_once(f"pipeline_{name}", PIPELINES[name].save)
        explorer = explorer_of(str(folder), "--size", "32x48", *guided, "model.max_sequence_length=24")
    group = explorer.sample(PROMPT, UNITS, count=2)
    last = len(group.layers) - 1
    cases = [(None, None, UNITS), (None, 1, UNITS[1:]), (0, None, UNITS), (last, 0, UNITS[:1])]
    for layer, unit, units in cases:
        layers = None if layer is None else [group.layers[layer]]
        expected = denoise(
            group.policy,
            group.policy.encode([PROMPT] * 2),
            steps=2,
            kind="ode",
            generator=[stream(0, "star-explore", place) for place in range(2)],
            guidance_scale=2.0,
            units=text_units(group.policy, [Prompt(PROMPT, {}, tuple(units))] * 2),
            allocation=explorer.config.allocation.model_copy(update={"layers": layers}),
        )
        assert expected.weights is not None
        found = group.maps(layer, unit)
        np.testing.assert_allclose(found, expected.weights, rtol=5e-3, atol=1e-3)
        np.testing.assert_allclose(found.mean((2, 3)), 1.0, atol=1e-5)
        # Where fewer layers are recorded, others round differently.
        np.testing.assert_allclose(group.images, group.policy.decode(expected.latents[-1]).astype(float), atol=1)


def test_a_samples_noise_depends_on_its_place_alone_and_advantages_compare_the_group(
    explorer: Explorer, group: Group
) -> None:
    first = explorer.sample(PROMPT, UNITS, seed=5)
    np.testing.assert_allclose(first.images[0].astype(float), group.images[0], atol=1)
    assert first.advantages is not None and first.advantages.values.tolist() == [0.0]
    rewards = load_reward(explorer.config.reward)(group.images, [group.prompt] * 3)
    np.testing.assert_allclose(group.rewards, rewards)
    assert group.advantages is not None and group.advantages.dropped == 0
    np.testing.assert_allclose(group.advantages.values, (rewards - rewards.mean()) / (rewards.std() + 1e-4), rtol=1e-6)


def test_advantages_are_made_as_the_trainers_settings_say(explorer: Explorer) -> None:
    names = ["pickscore", "clip_score"]
    chosen = ["tiny", "--steps", "1", "reward.terms={pickscore: 2.0, clip_score: 1.0}", "reward.combine=advantages"]
    chosen += ["reward.floors={clip_score: -1.0}", "reward.gates={pickscore: {clip_score: -1.0}}", "--reward"]
    alone = settings(_parser().parse_intermixed_args([*chosen, names[0]])).reward
    assert alone.terms == {"pickscore": 2.0} and alone.floors == alone.gates == {}
    judged = explorer_of(*chosen, ",".join(names))
    assert judged.config.reward.floors == {"clip_score": -1.0} and judged.config.reward.gates
    group = judged.sample(PROMPT, UNITS, count=3)
    assert judged.reward is not None and group.advantages is not None
    each = judged.reward.each(group.images, [group.prompt] * 3)
    np.testing.assert_allclose(group.rewards, each @ [2.0, 1.0])
    total = ((each - each.mean(0)) / (each.std(0) + 1e-4)) @ [2.0, 1.0]
    np.testing.assert_allclose(group.advantages.values, total / (total.std() + 1e-4), rtol=1e-6)


def test_maps_are_made_on_the_host_wherever_the_samples_were(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("STAR_KERNELS_BACKEND", "triton")
    for backend in ("triton", "auto", "reference"):
        again = dataclasses.replace(group, config=group.config.model_copy(update={"backend": backend}), _maps={})
        np.testing.assert_allclose(again.maps(), group.maps(), rtol=1e-5)


def test_the_newest_groups_are_kept_and_a_page_has_one(explorer: Explorer, group: Group) -> None:
    first = explorer.keep(group)
    second = explorer.keep(group, instead=first)
    third = explorer.keep(group)
    assert explorer.kept(second) is explorer.kept(third) is group
    explorer.keep(group)
    for number in (first, second):
        with pytest.raises(ConfigError, match="group: only the newest 2 are kept"):
            explorer.kept(number)


def test_the_advantages_place_is_blue_where_it_is_reinforced_and_orange_where_it_is_held_back(group: Group) -> None:
    assert group.advantages is not None
    order = np.argsort(group.advantages.values)
    for sample, strongest in ((order[-1], 2), (order[0], 0)):
        picture, overlay, legend = view(group, sample, 1, place_of_advantage=True, opacity=1.0)
        assert picture.size == overlay.size and max(picture.size) <= 448
        values = group.advantages.values[sample] * group.maps()[1, sample]
        row, column = np.unravel_index(np.abs(values).argmax(), values.shape)
        side = overlay.width // values.shape[1]
        colour = overlay.getpixel((int(column) * side + side // 2, int(row) * side + side // 2))
        assert int(np.argmax(colour)) == strongest, colour
        assert f"A·w from {values.min():.2f} to {values.max():.2f}" in legend
        plain, under, _ = view(group, sample, 1, opacity=0.0)
        np.testing.assert_array_equal(np.asarray(under.convert("L")), np.asarray(plain.convert("L")))


def test_units_are_found_by_rule_and_the_size_is_changed(explorer: Explorer) -> None:
    assert explorer.units(PROMPT) == UNITS and explorer.units("  ") == []
    sizes = [explorer.sample(PROMPT, UNITS, steps=1, size=size).images.shape for size in ("32x48", "", "32x48")]
    assert sizes == [(1, 32, 48, 3), (1, 64, 64, 3), (1, 32, 48, 3)]


def test_a_runs_folder_gives_its_weights_and_settings_and_base_leaves_them_out() -> None:
    trained = explorer_of("tiny", "--adapter", str(RUN))
    saved = json.loads((RUN / "config.json").read_text())
    assert trained.config.evaluation.steps == saved["evaluation"]["steps"] == 2 and trained.adapted
    pictures = [trained.sample(PROMPT, UNITS, base=base).images for base in (False, True)]
    plain = explorer_of("tiny", "--steps", "2").sample(PROMPT, UNITS).images
    assert not np.array_equal(*pictures)
    np.testing.assert_array_equal(pictures[1], plain)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text": " "}, "prompt: expected some text"),
        ({"units": []}, "units: expected at least one phrase"),
        ({"units": ["green cross"]}, "'green cross'"),
        ({"size": "33"}, "model.resolution"),
        ({"size": "wide"}, "size: expected pixels of a side"),
        ({"steps": 0}, "evaluation: steps"),
        ({"guidance_scale": 0.5}, "evaluation: guidance_scale"),
        ({"count": 17}, "group: expected 1 to 16"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_sampled_is_named(changes: dict[str, object], named: str, explorer: Explorer) -> None:
    arguments = {"text": PROMPT, "units": UNITS, **changes}
    with pytest.raises(ConfigError, match=re.escape(named)):
        explorer.sample(**arguments)


def test_a_reward_needs_what_stands_beside_its_prompt(explorer: Explorer) -> None:
    judged = explorer_of("tiny", "--steps", "1", "--reward", "scene_graded")
    judged.prompts = [SCENE]
    assert judged.sample(PROMPT, UNITS).rewards is not None
    with pytest.raises(RewardError, match="no usable requirements"):
        judged.sample("a red circle", ["red circle"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["./missing"], "PIPELINE: no such folder: ./missing"),
        (["empty"], "PIPELINE: 'empty' cannot be loaded"),
        (["tiny", "--adapter", "missing"], "--adapter: no such folder or file: missing"),
        (["tiny", "--adapter", "empty"], "--adapter"),
        (["tiny", "--reward", "beauty"], "'beauty'"),
        (["tiny", "--reward", ", "], "--reward"),
        (["tiny", "--size", "33"], "model.resolution"),
        (["tiny", "--size", "wide"], "size: expected pixels"),
        (["tiny", "--steps", "0"], "evaluation.steps"),
        (["tiny", "--guidance", "0"], "evaluation.guidance_scale"),
        (["tiny", "--prompts", "missing.txt"], "--prompts"),
        (["tiny", "--port", "0"], "--port"),
        (["tiny", "allocation.sharp=2"], "allocation.sharp"),
    ],
)
def test_what_cannot_be_served_is_named_on_the_command_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("star-explore: ") and named in error and error.count("\n") == 1


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.filterwarnings("ignore:::gradio")
def test_it_is_served_behind_a_proxy_and_what_stands_against_it_is_named(
    explorer: Explorer, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from star_trainer.studies.explore import page

    address = f"127.0.0.1:{free_port}"
    for name, value in {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": "example.com"}.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as without:
        without.setattr(page, "_without_proxy", lambda host: None)
        with pytest.raises(ConfigError, match=f"--host: the page at {address} cannot be opened from here: "):
            page.serve(explorer, "127.0.0.1", free_port)
    served = page.serve(explorer, "127.0.0.1", free_port)
    try:
        for name in ("no_proxy", "NO_PROXY"):
            assert os.environ[name] == "example.com,127.0.0.1,localhost"
        with pytest.raises(ConfigError, match=f"--port: cannot listen at {address}"):
            page.serve(explorer, "127.0.0.1", free_port)
    finally:
        served.close(verbose=False)


def test_pictures_are_kept_in_a_folder_of_ones_own_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from star_trainer.studies.explore import page

    at_end: list[Callable[[], None]] = []
    monkeypatch.setattr(page.atexit, "register", lambda *call, **named: at_end.append(partial(*call, **named)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    page._own_folder()
    page._own_folder()
    (folder,) = tmp_path.iterdir()
    assert os.environ["GRADIO_TEMP_DIR"] == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    (remove,) = at_end
    remove()
    assert not folder.exists()


@pytest.mark.filterwarnings("ignore:::gradio")
def test_the_page_in_a_browser(
    browser: Any, explorer: Explorer, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from playwright.sync_api import expect

    hosts, resolve = set(), socket.getaddrinfo

    def look_up(host: object, *rest: object, **named: object) -> object:
        hosts.add(host)
        return resolve(host, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    expect.set_options(timeout=30_000)
    from star_trainer.studies.explore.page import serve

    address = f"http://127.0.0.1:{free_port}"
    page_served = serve(explorer, "127.0.0.1", free_port)
    page = browser.new_page()
    try:
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.goto(address)
        page.get_by_role("button", name="Sample").click()
        expect(page.get_by_text("prompt: expected some text, got none")).to_be_visible()
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        for unit in UNITS:
            expect(page.get_by_role("checkbox", name=unit)).to_be_checked()
        page.get_by_role("button", name="Sample").click()
        overlay = page.locator("#overlay img")
        expect(overlay).to_be_visible()
        expect(page.get_by_text("step 2 of 3")).to_be_visible()
        before = overlay.get_attribute("src")
        page.get_by_role("slider", name="Step", exact=False).last.press("ArrowRight")
        expect(page.get_by_text("step 3 of 3")).to_be_visible()
        assert overlay.get_attribute("src") != before
        page.get_by_label("the advantage's place A·w").check()
        expect(page.get_by_text("A·w from")).to_be_visible()
        assert complaints == []
        assert all(url.startswith((address, "data:", "blob:")) for url in requests), requests
        assert hosts <= {"127.0.0.1", "localhost", None}
    finally:
        page.close()
        page_served.close()
