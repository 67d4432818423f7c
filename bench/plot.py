"""A picture of benchmark results: `python bench/plot.py bench/results/latest.json --out latest.png`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "python")]

from bench.harness import format_bytes, format_seconds, load_results

COLOURS = {"baseline": "#8c8c8c", "faster": "#2a7f62", "slower": "#b5533c"}


def plot(results: dict[str, Any], out: Path) -> None:
    """Draw one panel per group: time relative to the baseline with quartiles; median time and peak memory as text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [group for group in results["groups"] if group["members"]]
    if not groups:
        raise ValueError("groups: expected at least one group with members, got none")
    rows = [len(group["members"]) for group in groups]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(9, 0.34 * sum(rows) + 0.75 * len(groups) + 0.6),
        gridspec_kw={"height_ratios": rows},
        squeeze=False,
        layout="constrained",
    )
    for axis, group in zip(axes[:, 0], groups, strict=True):
        _draw(axis, group)
    environment = results["environment"]
    software = f"torch {environment['torch']}, triton {environment['triton']}"
    figure.suptitle(f"{environment['device']}, {software}, {results['date'][:10]}", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw(axis: Any, group: dict[str, Any]) -> None:
    members, baseline = group["members"], group["baseline"]
    # Relative to the baseline where there is one, else milliseconds.
    scale, key = (1.0, "ratio") if baseline is not None else (1e3, "seconds")
    spreads = [member[key] for member in members]
    medians = [scale * values["median"] for values in spreads]
    errors = [
        [scale * (values["median"] - values["q1"]) for values in spreads],
        [scale * (values["q3"] - values["median"]) for values in spreads],
    ]
    colours = [_colour(member, baseline) for member in members]
    axis.barh(range(len(members)), medians, xerr=errors, color=colours, height=0.66, error_kw={"lw": 0.8})
    axis.set_yticks(range(len(members)), [member["name"] for member in members], fontsize=8)
    axis.invert_yaxis()
    if baseline is not None:
        axis.axvline(1.0, color="black", lw=0.8, ls=":")
    axis.set_title(group["name"], loc="left", fontsize=8.5)
    axis.set_xlabel("ms" if baseline is None else f"time / time of {baseline}", fontsize=7, labelpad=1)
    axis.tick_params(axis="x", labelsize=7)
    end = max(median + error for median, error in zip(medians, errors[1], strict=True))
    axis.set_xlim(0, 1.45 * end)
    for i, member in enumerate(members):
        text = f"{format_seconds(member['seconds']['median'])}, {format_bytes(member['peak_bytes'])}"
        axis.text(medians[i] + errors[1][i] + 0.01 * end, i, text, va="center", fontsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _colour(member: dict[str, Any], baseline: str | None) -> str:
    if baseline in (None, member["name"]):
        return COLOURS["baseline"]
    return COLOURS["faster" if member["ratio"]["median"] <= 1 else "slower"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON from pytest bench or bench/gpu.py")
    parser.add_argument("--out", type=Path, help="PNG to write (default: beside the JSON)")
    options = parser.parse_args(arguments)
    out = options.out or options.results.with_suffix(".png")
    try:
        plot(load_results(options.results), out)
    except ValueError as error:
        parser.error(str(error))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
