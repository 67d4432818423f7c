"""Pictures of a run: whole PNG files whose text is neither cut nor covered by other text, whatever the run holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image, ImageDraw
from star_trainer.run import pictures as report
from star_trainer.run.pictures import allocation_sheet, before_after_sheet, curves_figure, plot_curves

NAN, INF = math.nan, math.inf
TRAINING = ("reward/mean", "reward/std", "train/clip_fraction", "train/kl", "train/gradient_norm")
SECONDS = ("seconds/rollout", "seconds/reward", "seconds/update")
LONG = "a photo of a red circle left of a blue square and so on, " * 20
UNBROKEN = "supercalifragilistic" * 30
PROMPTS = ("a red circle", LONG, UNBROKEN, "", "ein grüner Würfel über den Dächern von 北京", "two\nlines\tand a tab")


def history(iterations: int) -> list[dict[str, float]]:
    """What a run logs: an evaluation before the first and after every fourth iteration, each iteration's metrics."""
    rng = np.random.default_rng(0)
    entries: list[dict[str, float]] = [{"iteration": 0, "eval/strict": 0.4, "eval/graded": 0.6, "eval/prompts": 64}]
    for iteration in range(1, iterations + 1):
        entries.append({"iteration": iteration} | {key: float(rng.random()) for key in TRAINING + SECONDS})
        if iteration % 4 == 0:
            entries.append({"iteration": iteration, "eval/strict": float(rng.random()), "eval/graded": 0.7})
    return entries


def pictures(count: int, size: tuple[int, int] = (64, 64), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def maps(count: int, steps: int, grid: tuple[int, int] = (8, 8)) -> np.ndarray:
    weights = np.random.default_rng(0).gamma(2.0, size=(count, steps, *grid))
    return weights / weights.mean((2, 3), keepdims=True)


def open_picture(path: Path) -> np.ndarray:
    """The pixels of a valid PNG of a size that a person can look at, with a white border."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    height, width, _ = pixels.shape
    assert 150 <= width <= 4000 and 150 <= height <= 8000
    border = np.concatenate([pixels[:4].ravel(), pixels[-4:].ravel(), pixels[:, :4].ravel(), pixels[:, -4:].ravel()])
    assert (border == 255).all(), "something touches the border of the picture"
    assert pixels.min() < 150, "the picture is empty"
    return pixels


def assert_apart(boxes: list[tuple[str, tuple[float, float, float, float]]]) -> None:
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        across = min(first[2], second[2]) - max(first[0], second[0])
        along = min(first[3], second[3]) - max(first[1], second[1])
        assert across <= 0 or along <= 0, f"{a!r} and {b!r} overlap"


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple[float, float, float, float]]]]:
    """Every text that is drawn, with its box; at the end: inside of its sheet, and none over another."""
    drawn: list[tuple[str, tuple[float, float, float, float]]] = []
    sheets: list[ImageDraw.ImageDraw] = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: Any, words: str, *arguments: Any, **options: Any) -> None:
        box = self.textbbox(xy, words, font=options["font"])
        width, height = self.im.size
        assert box[0] >= 4 and box[1] >= 4 and box[2] <= width - 4 and box[3] <= height - 4, f"{words!r} is cut"
        drawn.append((words, box))
        sheets.append(self)
        draw_text(self, xy, words, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    yield drawn
    for sheet in {id(sheet) for sheet in sheets}:
        assert_apart([entry for entry, on in zip(drawn, sheets, strict=True) if id(on) == sheet and entry[0]])


HISTORIES: dict[str, list[dict[str, float]]] = {
    "a run": history(20),
    "a long run": history(700),
    "one iteration": history(1),
    "before the first iteration": history(0),
    "without evaluations": [entry for entry in history(5) if "reward/mean" in entry],
    "without iteration numbers": [{"reward/mean": 0.1 * i, "train/kl": 0.0} for i in range(4)],
    "other rewards": [{"iteration": i, "eval/reward": 0.2, "eval/ocr": 0.1 * i} for i in range(3)],
    "spread missing": [{"iteration": i, "reward/mean": 0.2} for i in range(3)],
    "some keys missing": [{"iteration": i, TRAINING[i]: 1.0, SECONDS[i % 3]: 2.0} for i in range(5)],
    "NaN among the values": history(3) + [dict.fromkeys(TRAINING + SECONDS, NAN) | {"iteration": 4}] + history(6)[6:],
    "nothing but NaN": [{"iteration": i} | dict.fromkeys(TRAINING + SECONDS, NAN) for i in range(3)],
    "infinity": [*history(3), {"iteration": 4, "train/gradient_norm": INF, "train/kl": -INF, "reward/std": INF}],
    "large and small": [{"iteration": i, "train/gradient_norm": 1e12 * i, "train/kl": 1e-12 * i} for i in range(4)],
    "negative": [{"iteration": i, "reward/mean": -5.0 - i, "train/kl": -1e-5 * i} for i in range(4)],
    "constant zero": [{"iteration": i, "train/clip_fraction": 0.0, "train/gradient_norm": 0.0} for i in range(4)],
    "empty": [],
}


@pytest.mark.parametrize("name", HISTORIES)
def test_curves_of_any_history_are_a_picture(tmp_path: Path, name: str) -> None:
    plot_curves(HISTORIES[name], tmp_path / "curves.png")
    open_picture(tmp_path / "curves.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", HISTORIES)
def test_text_of_the_curves_does_not_overlap(name: str) -> None:
    figure = curves_figure(HISTORIES[name])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = []
    for axes in figure.axes:
        legend = axes.get_legend()
        ticks = [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.get_offset_text()]
        offset = axes.yaxis.get_offset_text()
        others = [axes._left_title, axes.xaxis.label, offset, *(legend.get_texts() if legend else [])]  # type: ignore[attr-defined]
        low, high = axes.get_xlim()
        for text in ticks + others:
            shown = text not in axes.get_xticklabels() or low <= text.get_position()[0] <= high
            if text.get_text() and shown:
                # A little smaller: text may touch.
                boxes.append((text.get_text(), text.get_window_extent().padded(-0.5).extents))
    assert_apart(boxes)


def panel_titles(entries: list[dict[str, float]]) -> list[str]:
    return [axes.get_title(loc="left") for axes in curves_figure(entries).axes]


def test_there_is_a_panel_for_each_metric_that_the_history_has() -> None:
    assert len(panel_titles(history(4))) == 6
    assert panel_titles(history(0)) == ["Held-out reward"]
    assert panel_titles([{"iteration": 1, "train/kl": 0.1, "seconds/update": 2.0}]) == [
        "KL to the reference",
        "Seconds per iteration",
    ]
    assert panel_titles([{"iteration": 1, "train/kl": NAN}]) == []


def test_curves_show_the_values_at_their_iterations() -> None:
    entries = history(8)
    axes = {panel.get_title(loc="left"): panel for panel in curves_figure(entries).axes}
    strict, graded = axes["Held-out reward"].lines
    assert (strict.get_label(), graded.get_label()) == ("strict", "graded")
    assert np.asarray(strict.get_xdata()).tolist() == [0, 4, 8]
    assert np.asarray(strict.get_ydata()).tolist() == [e["eval/strict"] for e in entries if "eval/strict" in e]
    (norm,) = axes["Gradient norm"].lines
    assert np.asarray(norm.get_xdata()).tolist() == list(range(1, 9))
    assert np.asarray(norm.get_ydata()).tolist() == [e["train/gradient_norm"] for e in entries if TRAINING[4] in e]
    tops = [patch.get_data() for patch in axes["Seconds per iteration"].patches]  # type: ignore[attr-defined]
    total = [sum(e[key] for key in SECONDS) for e in entries if SECONDS[0] in e]
    assert np.allclose(tops[-1].values, total)
    assert np.allclose(tops[1].baseline, tops[0].values) and np.allclose(tops[2].baseline, tops[1].values)


def test_values_that_are_not_finite_are_gaps() -> None:
    rows = [{"iteration": i, "train/kl": y, "seconds/update": y} for i, y in enumerate((1.0, INF, 2.0, NAN, 3.0))]
    kl, seconds = curves_figure(rows).axes
    assert np.array_equal(kl.lines[0].get_ydata(), [1.0, NAN, 2.0, NAN, 3.0], equal_nan=True)
    assert seconds.patches[0].get_data().values.tolist() == [1.0, 0.0, 2.0, 0.0, 3.0]  # type: ignore[attr-defined]
    assert kl.get_ylim()[1] < 4.0 and seconds.get_ylim()[1] < 4.0


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("size", [(64, 64), (16, 16), (512, 384), (30, 200)], ids=str)
def test_before_after_sheets_of_any_size(tmp_path: Path, texts: list[Any], count: int, size: tuple[int, int]) -> None:
    prompts = [f"a photo of {place} circles" for place in range(count)]
    rewards = np.linspace(0.0, 1.0, count)
    path = tmp_path / "sheet.png"
    before_after_sheet(prompts, pictures(count, size), pictures(count, size, 1), rewards, rewards[::-1], path)
    open_picture(path)
    words = [text for text, _ in texts]
    assert " ".join(words).count("a photo of") == count
    for reward in rewards:
        assert f"before {reward:.2f}" in words and f"after {reward:.2f}" in words


def test_a_before_after_sheet_holds_the_images_as_they_are(tmp_path: Path, texts: list[Any]) -> None:
    before, after = pictures(2), pictures(2, seed=1)
    before_after_sheet(["a", "b"], before, after, [0, 0], [0, 0], tmp_path / "sheet.png")
    pixels = open_picture(tmp_path / "sheet.png")
    x, y = (round(side) for side in dict(texts)["a"][:2])
    column = pixels[:, x + 1]
    # The image begins at the first row below the caption that is the image's; each of its pixels is 3 by 3.
    top = next(row for row in range(y, len(column)) if (column[row : row + 3] == before[0, 0, 0]).all())
    left = 20
    for place, image in enumerate((before[0], after[0])):
        start = left + place * (192 + 10)
        assert np.array_equal(pixels[top : top + 192 : 3, start : start + 192 : 3], image)


def test_long_odd_and_empty_prompts_fit(tmp_path: Path, texts: list[Any]) -> None:
    count = len(PROMPTS)
    images, path = pictures(count), tmp_path / "sheet.png"
    before_after_sheet(PROMPTS, images, images, [0.5] * count, [0.5] * count, path)
    open_picture(path)
    allocation_sheet(PROMPTS, images, maps(count, 3), [1.0, 0.6, 0.2], tmp_path / "maps.png")
    open_picture(tmp_path / "maps.png")
    assert any(text.endswith("…") for text, _ in texts)


def marks(pixels: np.ndarray) -> dict[str, int]:
    colours = {"better": report._BETTER, "worse": report._WORSE}
    return {
        name: int((pixels == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).sum())
        for name, colour in colours.items()
    }


def test_a_mark_shows_what_got_better_or_worse(tmp_path: Path, texts: list[Any]) -> None:
    grey = np.full((1, 64, 64, 3), 128, dtype=np.uint8)
    seen = {}
    for name, first, last in (("up", 0.0, 1.0), ("down", 1.0, 0.5), ("same", 0.5, 0.5), ("unknown", NAN, 0.5)):
        before_after_sheet(["x"], grey, grey, [first], [last], tmp_path / f"{name}.png")
        seen[name] = marks(open_picture(tmp_path / f"{name}.png"))
    assert seen["up"]["better"] > 40 and seen["up"]["worse"] == 0
    assert seen["down"]["worse"] > 40 and seen["down"]["better"] == 0
    assert seen["same"] == seen["unknown"] == {"better": 0, "worse": 0}


def test_the_heading_counts_and_leaves_out_what_is_not_known(tmp_path: Path, texts: list[Any]) -> None:
    images = pictures(5)
    first, last = [0.0, 1.0, 0.5, NAN, 0.0], [1.0, 0.5, 0.5, 1.0, 0.5]
    before_after_sheet(list("abcde"), images, images, first, last, tmp_path / "sheet.png")
    words = [text for text, _ in texts]
    assert words[0] == "mean reward 0.38 → 0.62   better 2, worse 1, same 1"
    assert "before –" in words
    before_after_sheet(["a"], images[:1], images[:1], [NAN], [NAN], tmp_path / "unknown.png")
    open_picture(tmp_path / "unknown.png")


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("steps", [1, 2, 10, 40])
@pytest.mark.parametrize(("size", "grid"), [((64, 64), (8, 8)), ((512, 512), (64, 64)), ((60, 90), (3, 7))], ids=str)
def test_allocation_sheets_of_any_size(
    tmp_path: Path, texts: list[Any], count: int, steps: int, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    prompts = [f"a photo of {place} circles" for place in range(count)]
    sigmas = np.linspace(1.0, 0.02, steps).tolist()
    path = tmp_path / "sheet.png"
    allocation_sheet(prompts, pictures(count, size), maps(count, steps, grid), sigmas, path)
    open_picture(path)
    titles = [text for text, _ in texts if text.startswith("σ")]
    assert len(titles) == min(steps, 12)
    assert titles[0] == "σ 1.00" and titles[-1] == f"σ {sigmas[-1]:.2f}"
    assert "1.00" in [text for text, _ in texts]


@pytest.mark.parametrize("value", [0.0, 1.0, NAN, INF, 1e9])
def test_maps_of_one_value_are_drawn(tmp_path: Path, texts: list[Any], value: float) -> None:
    allocation_sheet(["x"], pictures(1), np.full((1, 2, 8, 8), value), [1.0, 0.5], tmp_path / "sheet.png")
    open_picture(tmp_path / "sheet.png")


def map_pixels(path: Path, row: int = 0, step: int = 0) -> np.ndarray:
    """The pixels of a map on the sheet of grey images made below."""
    top = 20 + report._line_height(report._font(15, bold=True)) + 10 + report._line_height(report._font(14)) + 4
    height = 128 + 20 + report._line_height(report._font(14)) + 4
    start = 20 + (step + 1) * 138
    return open_picture(path)[top + row * height :, start:][:128, :128].astype(int)


def test_a_higher_weight_is_redder_and_the_scale_is_the_same_in_all_maps(tmp_path: Path) -> None:
    grey = np.full((2, 64, 64, 3), 128, dtype=np.uint8)
    weights = np.ones((2, 2, 8, 8))
    weights[0, 0, :4], weights[0, 0, 4:] = 0.25, 1.75
    weights[1, 1, :, :4], weights[1, 1, :, 4:] = 0.25, 1.75
    weights[1, 0, :4], weights[1, 0, 4:] = 0.75, 1.25
    allocation_sheet(["x", "y"], grey, weights, [1.0, 0.5], tmp_path / "sheet.png")
    first = map_pixels(tmp_path / "sheet.png")
    low, high = first[:64].reshape(-1, 3), first[64:].reshape(-1, 3)
    assert (low == low[0]).all() and (high == high[0]).all()
    assert low[0][2] > low[0][0] + 30 and high[0][0] > high[0][2] + 30
    second = map_pixels(tmp_path / "sheet.png", row=1, step=1)
    assert (second[:, :64] == low[0]).all() and (second[:, 64:] == high[0]).all()
    uniform = map_pixels(tmp_path / "sheet.png", row=0, step=1)
    assert (uniform == uniform[0, 0]).all()
    gentle = map_pixels(tmp_path / "sheet.png", row=1, step=0)
    assert low[0][0] < gentle[0, 0][0] < uniform[0, 0][0] and uniform[0, 0][2] > gentle[-1, 0][2] > high[0][2]


def test_weights_that_are_not_finite_are_grey(tmp_path: Path) -> None:
    grey = np.full((1, 64, 64, 3), 128, dtype=np.uint8)
    weights = maps(1, 1)
    weights[0, 0, 0, 0], weights[0, 0, 0, 1] = NAN, INF
    allocation_sheet(["x"], grey, weights, [1.0], tmp_path / "sheet.png")
    pixels = map_pixels(tmp_path / "sheet.png")
    assert (pixels[:16, :32] == 128).all()
    assert not (pixels[16:] == 128).all(-1).any()


ONE = pictures(1)


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda p: before_after_sheet([], ONE[:0], ONE[:0], [], [], p), "prompts: expected at least one"),
        (lambda p: before_after_sheet(["a", "b"], ONE, ONE, [0], [0], p), r"before: expected shape \[2, H, W, 3\]"),
        (lambda p: before_after_sheet(["a"], ONE, ONE[..., :1], [0], [0], p), r"after: .* got \[1, 64, 64, 1\]"),
        (lambda p: before_after_sheet(["a"], ONE / 255.0, ONE, [0], [0], p), "before: expected uint8, got float64"),
        (lambda p: before_after_sheet(["a"], ONE, ONE, [0, 1], [0], p), r"rewards_before: .* \[1\], got \[2\]"),
        (lambda p: before_after_sheet(["a"], ONE, ONE, [0], [], p), r"rewards_after: .* \[1\], got \[0\]"),
        (lambda p: allocation_sheet([], ONE[:0], maps(1, 1)[:0], [1.0], p), "prompts: expected at least one"),
        (lambda p: allocation_sheet(["a"], ONE[0], maps(1, 1), [1.0], p), "images: expected shape"),
        (
            lambda p: allocation_sheet(["a"], ONE, maps(2, 1), [1.0], p),
            r"weights: .* \[1, T, h, w\], got \[2, 1, 8, 8\]",
        ),
        (lambda p: allocation_sheet(["a"], ONE, maps(1, 1)[0], [1.0], p), r"weights: .* got \[1, 8, 8\]"),
        (
            lambda p: allocation_sheet(["a"], ONE, maps(1, 2), [1.0], p),
            "sigmas: expected one per denoising step, 2, got 1",
        ),
    ],
)
def test_input_that_does_not_fit_is_refused_and_leaves_no_file(tmp_path: Path, draw: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw(tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []


def test_pictures_replace_the_ones_before_and_leave_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_text("an older one")
    plot_curves(history(2), path)
    open_picture(path)
    before_after_sheet(["x"], ONE, ONE, [0], [1], path)
    allocation_sheet(["x"], ONE, maps(1, 2), [1.0, 0.5], path)
    open_picture(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]


def test_drawing_leaves_no_global_state(tmp_path: Path) -> None:
    import matplotlib.pyplot

    backend = matplotlib.get_backend()
    plot_curves(history(2), tmp_path / "curves.png")
    assert matplotlib.pyplot.get_fignums() == []
    assert matplotlib.get_backend() == backend


@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=st.text(st.sampled_from("abW i.,\n"), max_size=200), width=st.integers(20, 300), lines=st.integers(1, 4))
def test_wrapped_text_fits_and_loses_nothing_but_what_the_ellipsis_stands_for(
    text: str, width: int, lines: int
) -> None:
    font = report._font(15)
    wrapped = report._wrap(text, font, width, lines)
    assert 1 <= len(wrapped) <= lines
    assert all(font.getlength(line) <= width for line in wrapped)
    joined, letters = "".join("".join(wrapped).split()), "".join(text.split())
    if joined.endswith("…"):
        assert letters.startswith(joined[:-1])
    else:
        assert joined == letters
