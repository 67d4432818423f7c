"""Pictures of a run: curves over the iterations, images before and after, allocation maps over the images."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from star_trainer.report import colour_range
from star_trainer.run.files import write_atomically

# Colours that people who confuse red and green can tell apart (Okabe and Ito).
_BLUE, _ORANGE, _GREEN, _PURPLE = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
_INK, _FAINT, _BETTER, _WORSE = "#1a1a1a", "#6b6b6b", "#007a56", "#b8460e"
_GAP = 10
_MARGIN = 20
_BLEND = 0.6
_MOST_STEPS = 12


def plot_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw what a run's `history` holds as small multiples over the iteration, into a PNG.

    Each entry is a mapping of metrics, with its `iteration` (its place in the history where that is missing):
    ``eval/...`` (held-out reward, drawn as points), ``reward/mean`` with a band of ``reward/std``,
    ``train/clip_fraction``, ``train/kl``, ``train/gradient_norm`` and ``seconds/...`` (stacked). What no entry has
    is left out; NaN and infinity are gaps.
    """
    content = io.BytesIO()
    curves_figure(history).savefig(content, format="png")
    write_atomically(path, content.getvalue())


def curves_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """The figure of `plot_curves`; it belongs to nobody but the caller (no pyplot)."""
    panels = [panel for panel in curve_panels(history) if panel[1]]
    columns = min(3, max(1, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(4.6 * columns, 3.1 * rows), dpi=110, layout=layout)
    if not panels:
        figure.text(0.5, 0.5, "no metrics yet", ha="center", va="center", color=_FAINT)
    seen = [x for _, series, _ in panels for x, *_ in series.values()]
    first, last = (min(x.min() for x in seen), max(x.max() for x in seen)) if seen else (0.0, 1.0)
    margin = max(0.6, 0.02 * (last - first))
    for place, (title, series, draw) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        draw(axes, series)
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=_INK, pad=22)
        if len(series) > 1:
            # Between title and axes, where it can cover no curve.
            axes.legend(
                loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=len(series), frameon=False, fontsize=8.5,
                handlelength=1.2, columnspacing=1.2, borderaxespad=0.2,
            )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5, colors=_FAINT)
        axes.set_xlim(first - margin, last + margin)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if place + columns >= len(panels):
            axes.set_xlabel("iteration", fontsize=9, color=_FAINT)
    return figure


def before_after_sheet(
    prompts: Sequence[str],
    before: np.ndarray,
    after: np.ndarray,
    rewards_before: Sequence[float] | np.ndarray,
    rewards_after: Sequence[float] | np.ndarray,
    path: Path,
) -> None:
    """Draw images of the same prompts side by side, with their rewards and a mark of the change, into a PNG.

    Args:
        prompts: N captions; long ones are wrapped and, after three lines, cut.
        before, after: [N, H, W, 3] uint8.
        rewards_before, rewards_after: [N]; NaN is shown as a dash.
        path: the file to write, whole or not at all.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_images("before", before, len(prompts))
    _check_images("after", after, len(prompts))
    first, last = (np.asarray(rewards, dtype=np.float64) for rewards in (rewards_before, rewards_after))
    for name, rewards in (("rewards_before", first), ("rewards_after", last)):
        if rewards.shape != (len(prompts),):
            raise ValueError(f"{name}: expected one per prompt, [{len(prompts)}], got {list(rewards.shape)}")
    tiles = [(enlarged(a, 192), enlarged(b, 192)) for a, b in zip(before, after, strict=True)]
    width, height = tiles[0][0].size
    wide, text, large = max(width, 120), _font(15), _font(19, bold=True)
    cell = 2 * wide + _GAP
    captions = [_wrap(prompt, text, cell, lines=3) for prompt in prompts]
    columns = max(1, min(len(prompts), round(math.sqrt(len(prompts) * (height + 90) / cell * 1.5))))
    rows = [range(start, min(start + columns, len(prompts))) for start in range(0, len(prompts), columns)]
    line = _line_height(text)
    tops, top = [], _MARGIN + _line_height(large) + 2 * _GAP
    for row in rows:
        tops.append(top)
        top += max(len(captions[i]) for i in row) * line + height + line + 4 * _GAP
    heading = _change_heading(first, last)
    size = max(columns * (cell + 3 * _GAP) - 3 * _GAP, math.ceil(large.getlength(heading))) + 2 * _MARGIN
    sheet = Image.new("RGB", (size, top - 2 * _GAP + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), heading, fill=_INK, font=large)
    for row, top in zip(rows, tops, strict=True):
        lines = max(len(captions[i]) for i in row)
        for column, i in enumerate(row):
            left = _MARGIN + column * (cell + 3 * _GAP)
            # Captions of a row end at the same height, right above their images.
            for offset, caption in enumerate(captions[i], start=lines - len(captions[i])):
                draw.text((left, top + offset * line), caption, fill=_INK, font=text)
            picture_top = top + lines * line + _GAP // 2
            for place, (tile, rewards) in enumerate(zip(tiles[i], (first, last), strict=True)):
                x = left + place * (wide + _GAP)
                sheet.paste(tile, (x, picture_top))
                label = ("before " if place == 0 else "after ") + _number(rewards[i])
                draw.text((x, picture_top + height + 4), label, fill=_FAINT if place == 0 else _INK, font=text)
                if place == 1:
                    _draw_mark(draw, x + text.getlength(label) + 8, picture_top + height + 4, line, last[i] - first[i])
    _save(sheet, path)


def allocation_sheet(
    prompts: Sequence[str],
    images: np.ndarray,
    weights: np.ndarray,
    sigmas: Sequence[float],
    path: Path,
    *,
    symbol: str = "σ",
) -> None:
    """Draw, per prompt, the image and the allocation map of each denoising step blended over it, into a PNG.

    All maps share one colour scale. Of more than twelve steps, twelve evenly spread ones are shown.

    Args:
        prompts: N captions; long ones are wrapped and, after two lines, cut.
        images: [N, H, W, 3] uint8.
        weights: [N, T, h, w], the maps of docs/method.md, section 4; what is not finite is drawn in grey.
        sigmas: T noise levels, the titles of the columns.
        path: the file to write, whole or not at all.
        symbol: of the noise levels.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    _check_images("images", images, len(prompts))
    weights = np.asarray(weights, dtype=np.float64)
    if weights.ndim != 4 or weights.shape[0] != len(prompts) or 0 in weights.shape:
        raise ValueError(f"weights: expected shape [{len(prompts)}, T, h, w], got {list(weights.shape)}")
    if len(sigmas) != weights.shape[1]:
        raise ValueError(f"sigmas: expected one per denoising step, {weights.shape[1]}, got {len(sigmas)}")
    count = min(weights.shape[1], _MOST_STEPS)
    steps = np.linspace(0, weights.shape[1] - 1, count).round().astype(int)
    scale = weight_scale(weights[:, steps])
    tiles = [enlarged(image, 128) for image in images]
    width, height = tiles[0].size
    wide, text, bold = max(width, 64), _font(14), _font(15, bold=True)
    line = _line_height(text)
    # Room for the colour bar's label even where there is one step only.
    inner = (count + 1) * (wide + _GAP) - _GAP
    captions = [_wrap(prompt, text, inner, lines=2) for prompt in prompts]
    header = _MARGIN + _line_height(bold) + _GAP
    bar_left = _MARGIN + inner + 3 * _GAP
    top = header
    tops = []
    for caption in captions:
        tops.append(top + len(caption) * line + 4)
        top = tops[-1] + height + 2 * _GAP
    bar_width = 18 + 8 + math.ceil(max(text.getlength(f"{value:.2f}") for value in (scale.low, 1.0, scale.high)))
    label = ("weight", "(mean 1)")
    bar_width = max(bar_width, *(math.ceil(text.getlength(part)) for part in label))
    # The bar with its label needs some height even for a single small row.
    bottom = max(top - 2 * _GAP, header + 2 * line + 120)
    sheet = Image.new("RGB", (bar_left + bar_width + _MARGIN, bottom + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(["image", *(f"{symbol} {sigmas[step]:.2f}" for step in steps)]):
        draw.text((_MARGIN + column * (wide + _GAP), _MARGIN), title, fill=_INK, font=bold)
    for i, (caption, tile) in enumerate(zip(captions, tiles, strict=True)):
        for number, part in enumerate(reversed(caption), start=1):
            draw.text((_MARGIN, tops[i] - 4 - number * line), part, fill=_INK, font=text)
        sheet.paste(tile, (_MARGIN, tops[i]))
        for column, step in enumerate(steps, start=1):
            blended = blend(tile, weights[i, step], scale)
            sheet.paste(blended, (_MARGIN + column * (wide + _GAP), tops[i]))
    for number, part in enumerate(label):
        draw.text((bar_left, header + number * line), part, fill=_INK, font=text)
    _draw_bar(sheet, bar_left, header + 2 * line + _GAP, bottom, scale, text)
    _save(sheet, path)


def curve_panels(
    history: Sequence[Mapping[str, float]],
) -> list[tuple[str, dict[str, tuple[np.ndarray, ...]], Any]]:
    """Title, named series (iterations and values, the entries that have them) and drawing function of each panel."""

    def series(key: str) -> tuple[np.ndarray, np.ndarray]:
        points = [(entry.get("iteration", place), entry[key]) for place, entry in enumerate(history) if key in entry]
        array = np.array(points, dtype=np.float64).reshape(-1, 2)
        array[~np.isfinite(array[:, 1]), 1] = np.nan
        return array[:, 0], array[:, 1]

    def found(keys: dict[str, str]) -> dict[str, tuple[np.ndarray, ...]]:
        pairs = {label: series(key) for label, key in keys.items()}
        return {label: pair for label, pair in pairs.items() if np.isfinite(pair[1]).any()}

    # How many prompts an evaluation had is no reward, and those of each tag are too many.
    evaluated = {key for entry in history for key in entry if key.startswith("eval/") and key.count("/") == 1}
    rewards = evaluated - {"eval/prompts"}
    order = sorted(rewards, key=lambda key: (key not in ("eval/strict", "eval/graded"), key != "eval/strict", key))
    training: dict[str, tuple[np.ndarray, ...]] = found({"mean": "reward/mean"})
    if training:
        both = [entry for entry in history if "reward/mean" in entry]
        spread = np.array([entry.get("reward/std", math.nan) for entry in both], dtype=np.float64)
        training = {"mean": (*training["mean"], spread)}
    seconds = {name: f"seconds/{name}" for name in ("rollout", "reward", "update")}
    return [
        ("Held-out reward", found({key.removeprefix("eval/"): key for key in order}), _draw_points),
        ("Training reward, mean ± std", training, _draw_band),
        ("Clip fraction", found({"clip": "train/clip_fraction"}), _draw_line(_PURPLE)),
        ("KL to the reference", found({"kl": "train/kl"}), _draw_line(_GREEN)),
        ("Gradient norm", found({"norm": "train/gradient_norm"}), _draw_line(_ORANGE)),
        ("Seconds per iteration", found(seconds), _draw_stack),
    ]


def _draw_points(axes: Axes, series: dict[str, tuple[np.ndarray, ...]]) -> None:
    styles = zip((_BLUE, _ORANGE, _GREEN, _PURPLE) * len(series), ("o", "s", "^", "D") * len(series), strict=True)
    for (label, (x, y)), (colour, marker) in zip(series.items(), styles, strict=False):
        seen = np.isfinite(y)
        axes.plot(x[seen], y[seen], color=colour, marker=marker, markersize=4.5, linewidth=1.2, label=label)


def _draw_band(axes: Axes, series: dict[str, tuple[np.ndarray, ...]]) -> None:
    x, y, spread = series["mean"]
    spread = np.where(np.isfinite(spread), spread, 0.0)
    axes.fill_between(x, y - spread, y + spread, color=_BLUE, alpha=0.16, linewidth=0)
    if len(x) == 1:
        # A band of one point has no width.
        axes.errorbar(x, y, spread, color=_BLUE, capsize=4)
    axes.plot(x, y, color=_BLUE, linewidth=1.5, marker=_marker(x))


def _draw_line(colour: str) -> Any:
    def draw(axes: Axes, series: dict[str, tuple[np.ndarray, ...]]) -> None:
        ((x, y),) = series.values()
        axes.plot(x, y, color=colour, linewidth=1.5, marker=_marker(x))
        if np.nanmin(y) >= 0.0:
            axes.set_ylim(bottom=0.0, top=None if np.nanmax(y) > 0.0 else 1.0)
        # A power of ten, where there is one, stands below the title, where other panels have their legend.
        axes.ticklabel_format(axis="y", style="plain" if _plain(y) else "sci", useOffset=False, scilimits=(0, 0))

    return draw


def _draw_stack(axes: Axes, series: dict[str, tuple[np.ndarray, ...]]) -> None:
    x = np.unique(np.concatenate([entry[0] for entry in series.values()]))
    middle = (x[1:] + x[:-1]) / 2
    edges = np.concatenate([[x[0] - 0.5], middle, [x[-1] + 0.5]])
    below = np.zeros(len(x))
    for (label, (own, y)), colour in zip(series.items(), (_BLUE, _ORANGE, _GREEN), strict=False):
        top = below.copy()
        np.add.at(top, np.searchsorted(x, own), np.nan_to_num(y))
        axes.stairs(top, edges, baseline=below, fill=True, color=colour, alpha=0.85, label=label)
        below = top
    axes.set_ylim(bottom=0.0)


def _marker(x: np.ndarray) -> str | None:
    """Points where there are few enough to see each: one between two gaps makes no line."""
    return "." if len(x) <= 60 else None


def _plain(values: np.ndarray) -> bool:
    largest = np.nanmax(np.abs(values))
    return largest == 0.0 or 1e-2 <= largest < 1e5


def _check_images(name: str, images: np.ndarray, count: int) -> None:
    if count == 0:
        raise ValueError("prompts: expected at least one, got none")
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[0] != count or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f"{name}: expected shape [{count}, H, W, 3], got {list(images.shape)}")
    if images.dtype != np.uint8:
        raise ValueError(f"{name}: expected uint8, got {images.dtype}")


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Matplotlib's own copy: the same letters on every machine, many scripts, and no package more.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent + 2


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Break a text into at most `lines` lines no wider than `width` pixels; what is cut off shows as an ellipsis."""
    wrapped: list[str] = []
    current = ""
    for word in text.split():
        candidate = f"{current} {word}".strip()
        if font.getlength(candidate) <= width:
            current = candidate
            continue
        if current:
            wrapped.append(current)
        while font.getlength(word) > width:
            part = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            wrapped.append(word[:part])
            word = word[part:]
        current = word
    wrapped.append(current)
    if len(wrapped) <= lines:
        return wrapped
    last = wrapped[lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*wrapped[: lines - 1], f"{last.rstrip()}…"]


def enlarged(image: np.ndarray, target: int) -> Image.Image:
    """An image enlarged by a whole factor to about `target` pixels, so that its pixels stay even, or shrunk to it."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    longest = max(picture.size)
    if longest <= target:
        factor = max(1, round(target / longest))
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    size = (max(1, round(side * target / longest)) for side in picture.size)
    return picture.resize(tuple(size), Image.Resampling.LANCZOS)  # type: ignore[arg-type]


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"


def _change_heading(before: np.ndarray, after: np.ndarray) -> str:
    change = after - before
    known = np.isfinite(change)
    if not known.any():
        return "before and after"
    means = f"mean reward {before[known].mean():.2f} → {after[known].mean():.2f}"
    better, worse = int((change[known] > 0).sum()), int((change[known] < 0).sum())
    return f"{means}   better {better}, worse {worse}, same {int(known.sum()) - better - worse}"


def _draw_mark(draw: ImageDraw.ImageDraw, x: float, y: float, height: int, change: float) -> None:
    """A triangle that points up where the reward rose and down where it fell; nothing where it did neither."""
    if not math.isfinite(change) or change == 0.0:
        return
    size, middle = 13, y + height / 2
    tip, base = (middle - size / 2, middle + size / 2) if change > 0 else (middle + size / 2, middle - size / 2)
    colour = _BETTER if change > 0 else _WORSE
    draw.polygon([(x, base), (x + size, base), (x + size / 2, tip)], fill=colour)


@dataclass(frozen=True)
class Scale:
    """Colours of numbers, which run from `low` over `middle` to `high`."""

    low: float
    middle: float
    high: float
    colours: Colormap

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Colours [..., 3] uint8 of values [...]; grey for what is not finite."""
        unit = np.interp(np.nan_to_num(values), (self.low, self.middle, self.high), (0.0, 0.5, 1.0))
        colours = self.colours(unit)[..., :3] * 255.0
        return np.where(np.isfinite(values)[..., None], colours, 128.0).round().astype(np.uint8)


def weight_scale(weights: np.ndarray) -> Scale:
    """Blue below the uniform weight of 1, pale at 1, red above; a few extreme tokens do not stretch it."""
    low, high = colour_range(weights)
    return Scale(low, 1.0, high, matplotlib.colormaps["RdYlBu_r"])


def blend(tile: Image.Image, values: np.ndarray, scale: Scale, opacity: float = _BLEND) -> Image.Image:
    """The colours of a map [h, w] over an image."""
    over = np.asarray(Image.fromarray(scale(values)).resize(tile.size, Image.Resampling.NEAREST), dtype=np.float64)
    # The image in grey: its own colours would be taken for the map's.
    under = np.asarray(tile.convert("L"), dtype=np.float64)[..., None]
    return Image.fromarray(((1.0 - opacity) * under + opacity * over).round().astype(np.uint8))


def _draw_bar(sheet: Image.Image, left: int, top: int, bottom: int, scale: Scale, font: ImageFont.FreeTypeFont) -> None:
    """The colour scale as a vertical bar, marked at its ends and at 1, the uniform weight, in the middle."""
    height, width, line = min(bottom - top, 300), 18, _line_height(font)
    values = np.interp(np.linspace(1.0, 0.0, height), (0.0, 0.5, 1.0), (scale.low, 1.0, scale.high))
    sheet.paste(Image.fromarray(scale(values[:, None].repeat(width, 1))), (left, top))
    draw = ImageDraw.Draw(sheet)
    for value, part in ((scale.high, 0.0), (1.0, 0.5), (scale.low, 1.0)):
        y = top + part * (height - 1)
        draw.line([(left + width, y), (left + width + 4, y)], fill=_INK)
        draw.text((left + width + 8, top + part * (height - line)), f"{value:.2f}", fill=_INK, font=font)


def _save(sheet: Image.Image, path: Path) -> None:
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_atomically(path, content.getvalue())
