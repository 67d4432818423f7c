"""Samples under their maps, and under what these make of the advantage."""

from __future__ import annotations

import html

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex
from PIL import Image

from star_trainer.run.pictures import Scale, blend, enlarged, weight_scale
from star_trainer.studies.explore.sampling import Group

_PIXELS = 448
# Blue for what is reinforced and orange for what is held back, which all can tell apart.
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0.0, "#b34700"), (0.35, "#f2a65a"), (0.5, "#f7f7f7"), (0.65, "#56a0d3"), (1.0, "#00528f")]
)


def view(
    group: Group,
    sample: int,
    step: int,
    layer: int | None = None,
    unit: int | None = None,
    *,
    place_of_advantage: bool = False,
    opacity: float = 0.6,
) -> tuple[Image.Image, Image.Image, str]:
    """A sample, the same under its map, or under its advantage times that, and a legend in HTML.

    Colours are those of one scale for all steps and samples of the group.
    """
    maps = group.maps(layer, unit)
    weights = maps[step, sample]
    said = [f"step {step + 1} of {len(maps)}, {group.policy.family.noising.symbol} {group.levels[step]:.2f}"]
    said += ["mean over layers" if layer is None else f"layer {group.layers[layer]}"]
    said += ["all units" if unit is None else f"“{group.prompt.units[unit]}”"]
    if place_of_advantage and group.advantages is not None:
        advantages = group.advantages.values
        values, name = advantages[sample] * weights, "A·w"
        most = max(float(np.percentile(np.abs(advantages[:, None, None] * maps), 99.5)), 1e-6)
        scale = Scale(-most, 0.0, most, _SIGNED)
        said += [f"A = {advantages[sample]:+.2f}"]
    else:
        values, name, scale = weights, "w", weight_scale(maps)
    said += [f"{name} from {values.min():.2f} to {values.max():.2f}"]
    picture = enlarged(group.images[sample], _PIXELS)
    return picture, blend(picture, values, scale, opacity), _legend(", ".join(said), name, scale)


def tiles(group: Group) -> list[tuple[Image.Image, str]]:
    """The group's pictures, small, each with what it got."""
    captions = [f"{place + 1}" for place in range(len(group.images))]
    if group.rewards is not None and group.advantages is not None:
        numbers = zip(captions, group.rewards, group.advantages.values, strict=True)
        captions = [f"{reward:.3g}, A {advantage:+.2f}" for _, reward, advantage in numbers]
    return [(enlarged(image, 128), caption) for image, caption in zip(group.images, captions, strict=True)]


def _legend(text: str, name: str, scale: Scale) -> str:
    """The scale's colours as a bar with numbers under its ends and middle, and a line above it."""
    colours = ", ".join(to_hex(scale.colours(share)) for share in np.linspace(0.0, 1.0, 9))
    ends = "".join(f"<span>{value:.2f}</span>" for value in (scale.low, scale.middle, scale.high))
    return (
        f'<div id="said">{html.escape(text)}</div>'
        f'<div role="img" aria-label="colours of {name}" '
        f'style="height:12px;margin-top:4px;background:linear-gradient(90deg,{colours})"></div>'
        f'<div style="display:flex;justify-content:space-between">{ends}</div>'
    )
