"""The page of a run: what training changed, its curves, and how its images form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from star_trainer.config import Config
from star_trainer.report import Charts, Denoising, Line, Pairs, Section, Table, lines, page
from star_trainer.run.evaluation import HeldOut
from star_trainer.run.pictures import curve_panels

READING = "Numbers show where one points, and by the arrow keys."
_MAPS = (
    "From other noise than above, the image that each denoising step predicts; over it, in grey, where its advantage "
    "goes, by the map that training uses or by that of one text unit alone."
)
_NO_MAPS = (
    "From other noise than above, the image that each denoising step predicts. The method {} records no attention: "
    "there are no maps."
)


def run_page(
    config: Config, iteration: int, history: Sequence[Mapping[str, float]], held_out: HeldOut, denoising: Denoising
) -> bytes:
    """HTML of a run after so many iterations, when the base and these weights were evaluated."""
    base, latest = held_out.base, held_out.latest
    assert base is not None and latest is not None, "both were evaluated"
    count, score = min(len(base.images), len(latest.images)), held_out.shown
    pairs = Pairs(
        [prompt.text for prompt in held_out.prompts[:count]],
        {"before": base.images, "after": latest.images},
        {"before": base.scores[score], "after": latest.scores[score]},
    )
    forming = _MAPS if denoising.has_maps else _NO_MAPS.format(config.method)
    sections = [
        Section("What training changed", "On held-out prompts, from the same noise.", _differences(held_out)),
        Section("Curves", READING, Charts(run_charts(history))),
        Section("Before and after", f"The first held-out prompts, each image with its score, {score}.", pairs),
        Section("How images form", forming, denoising),
    ]
    facts = {
        "model": config.model.pipeline,
        "method": config.method,
        "seed": str(config.run.seed),
        "iterations": f"{iteration} of {config.train.iterations}",
        "trained on": ", ".join(f"{weight:g} × {name}" for name, weight in config.reward.terms.items()),
        "held-out prompts": str(len(latest)),
        "folder": config.run.folder,
    }
    return page(f"{config.model.pipeline} trained by {config.method}, seed {config.run.seed}", facts, sections)


def run_charts(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The panels of `pictures.plot_curves` that have something to show, as SVGs by title."""
    charts = {}
    for title, series, _ in curve_panels(history):
        # Rewards have scales of their own; what else is measured begins at 0.
        from_zero = "reward" not in title.lower()
        found = {}
        for name, (x, y, *spread) in series.items():
            found[name] = Line(x, y, y - spread[0], y + spread[0]) if spread else Line(x, y)
        if found:
            charts[title] = lines(found, "iteration", from_zero=from_zero)
    return charts


def _differences(held_out: HeldOut) -> Table:
    base, latest = held_out.base, held_out.latest
    assert base is not None and latest is not None, "both were evaluated"
    rows = []
    for name, found in held_out.comparison().items():
        before, after = base.scores[name][: len(latest)].mean(), latest.scores[name].mean()
        interval = f"[{found.low:+.4f}, {found.high:+.4f}]"
        numbers = [f"{before:.4f}", f"{after:.4f}", f"{found.mean:+.4f}", interval, f"{found.p_value:.1e}"]
        rows.append([name, *numbers, found.verdict])
    return Table(["score", "before", "after", "difference", "95 % interval", "p", "verdict"], rows)
