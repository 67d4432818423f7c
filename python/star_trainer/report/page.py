"""The page: what its sections can hold, and how it is made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from star_trainer.report.images import colour_range, colour_table, data_uris, packed_maps

# The name of the map that training uses, among those of single units.
ALL_WORDS = "all words"
# Together, with maps of at most 1.9 million characters and the charts, a page stays below 5 MB whatever it shows.
_PAIRS_BUDGET, _DENOISING_BUDGET = 700_000, 1_600_000
_MOST_PAIRS, _MOST_UNITS = 24, 6
# Prompts whose images are shown forming.
MOST_PROMPTS = 8


@dataclass(frozen=True)
class Charts:
    """SVGs of `lines` or `intervals`, by title."""

    charts: Mapping[str, str]
    kind = "charts"


@dataclass(frozen=True)
class Table:
    """A header and rows of as many cells."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    kind = "table"


@dataclass(frozen=True)
class Link:
    """Addresses beside the page, by what they are called."""

    links: Mapping[str, str]
    kind = "links"


@dataclass(frozen=True)
class Pairs:
    """Images of N prompts side by side, [N, H, W, 3] uint8 by name, and their scores [N] by that name; NaN is a dash.

    With the names ``before`` and ``after`` a prompt says whether its score rose or fell.
    """

    prompts: Sequence[str]
    images: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]
    kind = "pairs"

    def shown(self) -> list[dict[str, Any]]:
        """What the template shows of each prompt: of many prompts the first."""
        count = min(len(self.prompts), _MOST_PAIRS, *map(len, self.images.values()))
        found = iter(data_uris([image for some in self.images.values() for image in some[:count]], _PAIRS_BUDGET))
        sources = {name: [next(found) for _ in range(count)] for name in self.images}
        pairs = []
        for place in range(count):
            images = [(name, sources[name][place], _number(self.scores[name][place])) for name in self.images]
            change = math.nan
            if {"before", "after"} <= self.scores.keys():
                change = float(self.scores["after"][place] - self.scores["before"][place])
            mark = "▲ better" if change > 0 else "▼ worse" if change < 0 else ""
            pairs.append({"prompt": self.prompts[place], "images": images, "mark": mark})
        return pairs


@dataclass(frozen=True)
class Denoising:
    """How the images of N prompts form, at S of the denoising steps.

    Args:
        prompts: N texts.
        pictures: for each prompt [S, H, W, 3] uint8, the image that each step predicts, the last being the image
            itself; beyond `MOST_PROMPTS` this one alone will do.
        steps: S numbers of steps, counted from 1.
        levels: S noise levels, before each step.
        symbol: of a level.
        maps: for each prompt allocation maps [S, h, w] by name: of `ALL_WORDS` first, then of each unit alone; none
            where no attention was recorded.
    """

    prompts: Sequence[str]
    pictures: Sequence[np.ndarray]
    steps: Sequence[int]
    levels: Sequence[float]
    symbol: str
    maps: Sequence[Mapping[str, np.ndarray]]
    kind = "denoising"

    @property
    def has_maps(self) -> bool:
        return all(self.maps)

    def shown(self) -> dict[str, Any]:
        """What the page's script reads: of many prompts and units the first ones."""
        count = min(len(self.prompts), MOST_PROMPTS)
        maps = [dict(list(each.items())[: 1 + _MOST_UNITS]) for each in self.maps[:count]]
        every = [values.ravel() for each in maps for values in each.values()]
        low, high = colour_range(np.concatenate(every)) if every else (0.8, 1.2)
        largest = max([high, *(float(np.nanmax(v, initial=0.0, where=np.isfinite(v))) for v in every)])
        found = iter(data_uris([image for some in self.pictures[:count] for image in some], _DENOISING_BUDGET))
        cases = []
        for prompt, own in zip(self.prompts, maps, strict=False):
            grid, packed = packed_maps(np.stack(list(own.values())), largest) if own else ([0, 0], "")
            pictures = [next(found) for _ in self.steps]
            cases.append({"prompt": prompt, "units": list(own), "grid": grid, "maps": packed, "pictures": pictures})
        titles = [f"step {n}, {self.symbol} {level:.2f}" for n, level in zip(self.steps, self.levels, strict=True)]
        return {"cases": cases, "titles": titles, "low": low, "high": high, "largest": largest}


@dataclass(frozen=True)
class Section:
    """A heading, a few sentences, and what is shown below them."""

    title: str
    text: str
    content: Charts | Table | Link | Pairs | Denoising


def page(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> bytes:
    """The page as UTF-8: all texts are escaped, nothing is loaded from elsewhere.

    Args:
        title: its heading.
        facts: what stands below it, by name.
        sections: in their order; at most one shows how images form.
    """
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("star_trainer.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    denoising = [section.content.shown() for section in sections if isinstance(section.content, Denoising)]
    data = denoising[0] | {"colours": colour_table()} if denoising else None
    return templates.get_template("page.html").render(title=title, facts=facts, sections=sections, data=data).encode()


def markdown_tables(text: str) -> list[Table]:
    """The tables of a text that has nothing else, as commands print them."""
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [Table(rows[0], rows[2:]) for rows in tables if rows]


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"
