"""The page: right numbers where one points, whatever a prompt holds, in few bytes, in a browser and without one."""

from __future__ import annotations

import base64
import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from star_trainer.report import (
    ALL_WORDS,
    Charts,
    Denoising,
    Line,
    Link,
    Pairs,
    Section,
    Table,
    intervals,
    lines,
    markdown_tables,
    page,
)
from star_trainer.report.images import data_uris, packed_maps
from star_trainer.run.files import write_page

HOSTILE = "a </script><script>window.hacked = 1</script> & <img src=x onerror='window.hacked = 1'> \"circle\""
PROMPTS = [HOSTILE, "a red circle"]
STEPS, ROWS, COLUMNS = 3, 4, 6
# Where a canvas is the brightest, row by row.
BRIGHTEST = """canvas => {
  const seen = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const sums = Array.from({length: seen.length / 4}, (_, i) => seen[4 * i] + seen[4 * i + 1] + seen[4 * i + 2]);
  return sums.indexOf(Math.max(...sums));
}"""


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def maps_of(prompt: int) -> dict[str, np.ndarray]:
    """Maps whose weight is 3 at one place, another one for each prompt, unit and step, and 0.5 elsewhere."""
    found = {}
    for unit, name in enumerate((ALL_WORDS, "red", "<b>circle</b>")):
        found[name] = np.full((STEPS, ROWS, COLUMNS), 0.5)
        for step in range(STEPS):
            found[name][step, unit, step + prompt] = 3.0
    return found


def denoising(maps: bool = True) -> Denoising:
    images = pictures(2, STEPS, 64, 96)
    return Denoising(PROMPTS, images, [1, 2, 3], [1.0, 0.6, 0.2], "σ", [maps_of(0), maps_of(1)] if maps else [{}, {}])


def whole_page(maps: bool = True) -> bytes:
    images = {"before": pictures(2, 64, 64), "after": pictures(2, 64, 64, seed=1)}
    scores = {"before": np.array([0.5, np.nan]), "after": np.array([0.75, 1.0])}
    curve = Line([0, 1, 2], [0.25, np.nan, 0.75], [0.2, np.nan, 0.5], [0.3, np.nan, 1.0])
    other = Line([0, 2], [1.0, 2.0])
    sections = [
        Section("Numbers", "", Table(["name", "value"], [[HOSTILE, "1"]])),
        Section("Curves", "", Charts({"Reward": lines({"star": curve, HOSTILE: other}, "iteration")})),
        Section("Before and after", "", Pairs(PROMPTS, images, scores)),
        Section("How images form", "", denoising(maps)),
        Section("Runs", "", Link({"star": "star/seed_0/report.html"})),
    ]
    return page(f"Run {HOSTILE}", {"prompt": HOSTILE}, sections)


def data_of(content: bytes) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', content.decode(), re.S)
    assert found is not None
    return json.loads(found[1])


def test_texts_are_escaped_wherever_they_stand_and_reach_the_script_whole() -> None:
    content = whole_page().decode()
    assert "<script>window" not in content and "<img src=x" not in content and "<b>circle" not in content
    assert html.unescape(content).count(HOSTILE) >= 5
    data = data_of(content.encode())
    assert [case["prompt"] for case in data["cases"]] == PROMPTS
    assert data["cases"][0]["units"] == [ALL_WORDS, "red", "<b>circle</b>"]


def test_nothing_is_loaded_from_elsewhere() -> None:
    content = whole_page().decode()
    addresses = set(re.findall(r"""(?:src|href)=["']?([^"'> ]*)""", content)) - {"x"}
    assert {address for address in addresses if not address.startswith("data:")} == {"star/seed_0/report.html"}
    assert "url(" not in content and "default-src 'none'" in content


def test_packed_maps_hold_the_weights_to_half_a_level() -> None:
    weights = np.random.default_rng(0).random((2, 3, 5, 7)) * 4.0
    grid, packed = packed_maps(weights, 4.0)
    assert grid == [5, 7]
    levels = np.frombuffer(base64.b64decode(packed), dtype="<u2").reshape(weights.shape)
    np.testing.assert_allclose(levels * 4.0 / 65535.0, weights, atol=4.0 / 131070.0 + 1e-6)
    grid, packed = packed_maps(np.kron(weights, np.ones((16, 16))), 4.0)
    assert max(grid) <= 32 and len(base64.b64decode(packed)) == 2 * 2 * 3 * grid[0] * grid[1]
    coarse = np.frombuffer(base64.b64decode(packed), dtype="<u2") * 4.0 / 65535.0
    assert coarse.mean() == pytest.approx(weights.mean(), rel=0.02)


def test_a_page_stays_below_five_megabytes_whatever_it_shows() -> None:
    count, steps, grid = 40, 12, (64, 64)
    # What compresses worst.
    images = np.broadcast_to(pictures(1, 1, 1024, 1024), (count, steps, 1024, 1024, 3))
    own = {f"unit {k}": np.random.default_rng(k).random((steps, *grid)) for k in range(30)}
    maps = [{ALL_WORDS: own["unit 0"], **own}] * count
    texts, scores = ["x"] * count, np.ones(count)
    forms = Denoising(texts, images, list(range(steps)), [0.5] * steps, "σ", maps)
    pairs = Pairs(texts, dict.fromkeys(("before", "after"), images[:, 0]), dict.fromkeys(("before", "after"), scores))
    arms = {f"arm {arm}": Line(range(5000), np.random.default_rng(arm).random(5000)) for arm in range(8)}
    charts = Charts(dict.fromkeys("abcdef", lines(arms, "iteration")))
    content = page("large", {}, [Section("", "", each) for each in (charts, pairs, forms)])
    assert len(content) < 5_000_000
    data = data_of(content)
    assert len(data["cases"]) == 8 and len(data["cases"][0]["units"]) == 7
    assert sum(len(source) for case in data["cases"] for source in case["pictures"]) <= 1_600_000


def test_small_pictures_are_kept_to_the_bit() -> None:
    import io

    from PIL import Image

    image = pictures(64, 48)
    (source,) = data_uris([image], 10**6)
    content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), image)


def labels(svg: str) -> list[str]:
    return re.findall(r'aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="point"', svg)


def test_points_of_charts_say_their_numbers_and_gaps_have_none() -> None:
    nan = np.nan
    svg = lines({"star": Line([0, 1, 2], [0.25, nan, 0.75], [0.125, nan, 0.5], [0.375, nan, 1.0])}, "iteration")
    assert labels(svg) == ["star, iteration 0: 0.25 [0.125, 0.375]", "star, iteration 2: 0.75 [0.5, 1]"]
    svg = intervals({"star": (-0.5, -1.0, 0.25), "oracle": (0.5, nan, nan)}, "less uniform")
    assert labels(svg) == ["star: -0.5 [-1, 0.25]", "oracle: 0.5"]


def test_long_curves_are_means_over_equal_parts() -> None:
    found = labels(lines({"star": Line(range(1, 4001), np.arange(1, 4001) * 2.0)}, "iteration"))
    assert len(found) == 400
    assert found[0] == "star, mean of iteration 1 to 10: 11"


def test_tables_of_commands_are_read_back() -> None:
    first, second = markdown_tables("| a | b |\n|---|---|\n| 1 | |\n\n| c |\n|---|\n| -2 |\n")
    assert (first.header, first.rows) == (["a", "b"], [["1", ""]])
    assert (second.header, second.rows) == (["c"], [["-2"]])


def test_a_page_that_fails_leaves_the_one_before_and_is_said(tmp_path: Path) -> None:
    path, said = tmp_path / "report.html", []
    write_page(path, lambda: b"first")

    def fail() -> bytes:
        raise ImportError("no module named altair")

    write_page(path, fail, said.append)
    assert said == [f"{path} could not be written: ImportError: no module named altair"]
    assert path.read_bytes() == b"first" and [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_starting_a_run_imports_no_plotting_of_pages() -> None:
    script = "import sys, star_trainer.report; print({'altair', 'vl_convert', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


class Opened:
    """A page in a browser, and what went wrong there."""

    def __init__(self, tab: Any, path: Path) -> None:
        self.tab, self.wrong, self.asked = tab, [], []
        tab.on("console", lambda message: self.wrong.append(message.text))
        tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.goto(path.as_uri())

    def look(self, case: int) -> tuple[str, str]:
        """The picture and the map that a case shows."""
        source = f"document.querySelectorAll('.case')[{case}]"
        return (
            self.tab.evaluate(f"{source}.querySelector('.stage img').src"),
            self.tab.evaluate(f"{source}.querySelector('.stage canvas').toDataURL()"),
        )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(whole_page())
    return path


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Opened]:
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    found = Opened(tab, written)
    yield found
    tab.close()
    assert found.wrong == []
    assert [address for address in found.asked if not address.startswith("data:")] == [written.as_uri()]


def test_the_slider_moves_the_picture_and_its_map(opened: Opened) -> None:
    slider = opened.tab.locator(".case input").first
    data = data_of(whole_page())
    seen = []
    for step in range(STEPS):
        slider.fill(str(step))
        seen.append(opened.look(0))
        assert opened.tab.locator(".case output").first.text_content() == data["titles"][step]
    assert [picture for picture, _ in seen] == data["cases"][0]["pictures"]
    assert len({drawn for _, drawn in seen}) == STEPS
    slider.focus()
    opened.tab.keyboard.press("ArrowLeft")
    assert opened.look(0) == seen[-2] and opened.look(1) != seen[-2]


def test_the_choice_of_a_unit_changes_the_map_and_none_takes_it_away(opened: Opened) -> None:
    choice, canvas = opened.tab.locator(".case select").first, opened.tab.locator(".case .stage canvas").first
    assert choice.locator("option").all_text_contents() == [*maps_of(0), "nothing: the picture alone"]
    drawn = set()
    for unit in maps_of(0):
        choice.select_option(unit)
        drawn.add(opened.look(0)[1])
    assert len(drawn) == 3 and canvas.is_visible()
    choice.select_option("nothing: the picture alone")
    assert not canvas.is_visible()


def test_the_weight_is_read_where_one_points_and_by_the_arrow_keys(opened: Opened) -> None:
    case = opened.tab.locator(".case").first
    stage = case.locator(".stage")
    case.locator("select").select_option("red")
    case.locator("input").fill("1")
    # The place of unit 1 at step 1: row 2, column 2, counted from 1. Its colour is the brightest.
    assert stage.locator("canvas").evaluate(BRIGHTEST) == COLUMNS * 1 + 1
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    opened.tab.mouse.move(box["x"] + 1.5 / COLUMNS * box["width"], box["y"] + 1.5 / ROWS * box["height"])
    assert case.locator(".value").text_content() == "weight 3.0 in row 2, column 2"
    assert opened.tab.locator("#tip").text_content() == "weight 3.0 in row 2, column 2"
    opened.tab.mouse.move(box["x"] + 2.5 / COLUMNS * box["width"], box["y"] + 1.5 / ROWS * box["height"])
    assert case.locator(".value").text_content() == "weight 0.50 in row 2, column 3"
    opened.tab.mouse.move(0, 0)
    stage.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        opened.tab.keyboard.press(key)
    assert case.locator(".value").text_content() == "weight 3.0 in row 2, column 2"


def test_charts_read_their_numbers_by_pointer_and_key(opened: Opened) -> None:
    tip, chart = opened.tab.locator("#tip"), opened.tab.locator(".chart").first
    point = chart.locator('[aria-roledescription="point"]').first.bounding_box()
    opened.tab.mouse.move(point["x"] + 2, point["y"] + 2)
    assert tip.text_content() == "star, iteration 0: 0.25 [0.2, 0.3]"
    chart.focus()
    opened.tab.keyboard.press("ArrowRight")
    assert tip.text_content() == "star, iteration 2: 0.75 [0.5, 1]"


def test_texts_run_no_script(opened: Opened) -> None:
    assert opened.tab.evaluate("window.hacked === undefined")
    assert opened.tab.locator("h1").text_content() == f"Run {HOSTILE}"


def test_it_fits_a_phone_and_prints_every_step(opened: Opened, browser: Any) -> None:
    opened.tab.set_viewport_size({"width": 360, "height": 740})
    assert opened.tab.evaluate("document.documentElement.scrollWidth") == 360
    assert not opened.tab.locator(".sheet figure").first.is_visible()
    opened.tab.locator(".case select").first.select_option("red")
    opened.tab.emulate_media(media="print")
    first = opened.tab.locator(".case").first
    assert first.locator(".sheet figure:visible").count() == STEPS and not first.locator("input").is_visible()
    assert first.locator(".sheet").text_content().endswith("map of red")


def test_without_maps_pictures_move_and_nothing_is_offered_to_lay_over_them(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_bytes(whole_page(maps=False))
    tab = browser.new_page()
    opened = Opened(tab, path)
    before = opened.look(0)[0]
    tab.locator(".case input").first.fill("0")
    assert opened.look(0)[0] != before
    assert tab.locator(".case select").count() == 0 and not tab.locator(".case canvas").first.is_visible()
    tab.close()
    assert opened.wrong == []
