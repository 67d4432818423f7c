"""The page: a prompt, its units, a group of samples, and their maps by step, layer and unit."""

from __future__ import annotations

import atexit
import html
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from star_trainer.config import ConfigError, TrainerError
from star_trainer.studies.explore.sampling import MOST_SAMPLES, Explorer
from star_trainer.studies.explore.view import tiles, view

MAP, PLACE = "the map w", "the advantage's place A·w"
_FONTS = ("system-ui", "sans-serif")
_MONO = ("ui-monospace", "monospace")
_ABOUT = """# Where the advantage goes
The map *w* of a denoising step says how strongly each place attends to the prompt's units, with mean 1. STAR gives a
sample's advantage *A*, its reward less its group's mean over their spread, to each place as *A·w*."""


def serve(explorer: Explorer, host: str, port: int) -> gr.Blocks:
    """Serve the page until its `close`; returns once it can be opened.

    Raises:
        ConfigError: the port is taken, the address is none of this machine's, or the page cannot be opened there.
    """
    _own_folder()
    _without_proxy(host)
    page = build(explorer)
    # The usual theme loads its fonts from elsewhere.
    theme = gr.themes.Default(font=_FONTS, font_mono=_MONO)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            show_error=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=theme,
            css="#group .grid-wrap {min-height: 0}",
        )
    except OSError as error:
        raise ConfigError(f"--port: cannot listen at {host}:{port}; is it taken?") from error
    # gradio asks itself for the page, and raises what it pleases where that fails.
    except Exception as error:
        page.close(verbose=False)
        raise ConfigError(f"--host: the page at {host}:{port} cannot be opened from here: {error}") from error
    return page


def _own_folder() -> None:
    """Keep pictures out of the folder that all of a machine's users of gradio share, and no longer than the process."""
    if not os.environ.get("GRADIO_TEMP_DIR"):
        folder = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="star-explore-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _without_proxy(host: str) -> None:
    """Ask this machine itself for what it serves; a proxy of the environment is for the rest."""
    names = ("no_proxy", "NO_PROXY")
    before = {name: os.environ.get(name) for name in names}
    for name in names:
        # The lower-case one hides the other where both are there.
        hosts = (before[name] or before["no_proxy"] or before["NO_PROXY"] or "").split(",")
        if "*" not in hosts:
            os.environ[name] = ",".join(dict.fromkeys([*filter(None, hosts), "127.0.0.1", "localhost", host]))


def build(explorer: Explorer) -> gr.Blocks:
    """The page's parts and what they do."""
    evaluation, model = explorer.config.evaluation, explorer.config.model
    with gr.Blocks(title="star-explore", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        number, chosen = gr.State(), gr.State(0)
        gr.Markdown(_ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.Textbox(label="Prompt", lines=2, placeholder="a red circle left of a blue square")
                if explorer.prompts:
                    gr.Examples([[each.text] for each in explorer.prompts], prompt, label="Prompts of the file")
                units = gr.CheckboxGroup(label="Units", info="phrases of the prompt that the reward depends on")
                own = gr.Textbox(label="Other units", info="of your own, with commas between")
                count = gr.Slider(1, MOST_SAMPLES, 4, step=1, label="Samples of the group")
                steps = gr.Slider(1, max(50, evaluation.steps), evaluation.steps, step=1, label="Steps")
                with gr.Row():
                    seed = gr.Number(explorer.config.run.seed, label="Seed", precision=0, minimum=0, min_width=80)
                    size = gr.Textbox(_shown(model.size), label="Size", placeholder="512 or 512x768", min_width=80)
                    guidance = gr.Number(evaluation.guidance_scale, label="Guidance", step=0.5, min_width=80)
                base = gr.Checkbox(label="without what was trained", visible=explorer.adapted)
                button = gr.Button("Sample", variant="primary")
            with gr.Column(scale=5, min_width=480):
                gallery = gr.Gallery(
                    label="Group", columns=5, fit_columns=False, allow_preview=False, buttons=[], elem_id="group"
                )
                with gr.Row():
                    picture = gr.Image(label="Picture", buttons=[], interactive=False)
                    overlay = gr.Image(label="Map", buttons=[], interactive=False, elem_id="overlay")
                legend = gr.HTML()
                with gr.Row():
                    step = gr.Slider(1, evaluation.steps, 1, step=1, label="Step")
                    opacity = gr.Slider(0.0, 1.0, 0.6, label="Opacity")
                with gr.Row():
                    layer = gr.Dropdown(["mean"], value="mean", label="Layer", interactive=True)
                    unit = gr.Dropdown(["all"], value="all", label="Unit", interactive=True)
                shown = gr.Radio([MAP], value=MAP, label="Shown")

        def find_units(text: str) -> dict[str, Any]:
            found = explorer.units(text)
            return gr.CheckboxGroup(found, value=found)

        def sample(
            before: int | None,
            text: str,
            ticked: list[str],
            others: str,
            seed: float,
            count: float,
            steps: float,
            size: str,
            guidance: float,
            base: bool,
            progress: gr.Progress = gr.Progress(),  # noqa: B008
        ) -> list[Any]:
            with _said():
                drawn = explorer.sample(
                    text,
                    [*ticked, *(part.strip() for part in others.split(",") if part.strip())],
                    seed=int(seed or 0),
                    count=int(count),
                    steps=int(steps),
                    size=size,
                    guidance_scale=guidance,
                    base=base,
                    progress=lambda done, total: progress((done, total), unit="steps"),
                )
            for name in drawn.missing:
                gr.Warning(f"The text encoder cuts the prompt off before {html.escape(repr(name))}: it has no map.")
            if drawn.advantages is not None and drawn.advantages.dropped:
                gr.Warning("The rewards of the group do not differ, so that every advantage is 0.")
            kinds = [MAP] if drawn.advantages is None else [MAP, PLACE]
            last = len(drawn.levels)
            return [
                explorer.keep(drawn, instead=before),
                0,
                gr.Gallery(tiles(drawn), selected_index=0),
                gr.Slider(maximum=last, value=(last + 1) // 2),
                gr.Dropdown([("mean", "mean"), *((str(name), place) for place, name in enumerate(drawn.layers))],
                            value="mean"),
                gr.Dropdown([("all", "all"), *((name, place) for place, name in enumerate(drawn.prompt.units))],
                            value="all"),
                gr.Radio(kinds, value=MAP),
            ]  # fmt: skip

        def draw(
            number: int | None, chosen: int, step: float, layer: Any, unit: Any, shown: str, opacity: float
        ) -> tuple[Any, ...]:
            if number is None:
                return None, None, ""
            with _said():
                drawn = explorer.kept(number)
            places = (None if place in ("mean", "all") else place for place in (layer, unit))
            return view(drawn, chosen, int(step) - 1, *places, place_of_advantage=shown == PLACE, opacity=opacity)

        def choose(event: gr.SelectData) -> int:
            return event.index

        asked = [number, prompt, units, own, seed, count, steps, size, guidance, base]
        looked_at = [number, chosen, step, layer, unit, shown, opacity]
        outputs = [picture, overlay, legend]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        prompt.change(find_units, prompt, units, trigger_mode="always_last", **quiet)
        sampled = gr.on(
            [button.click, prompt.submit],
            sample,
            asked,
            [number, chosen, gallery, step, layer, unit, shown],
            show_progress_on=gallery,
            api_visibility="private",
        )
        sampled.success(draw, looked_at, outputs, **quiet)
        gallery.select(choose, None, chosen, **quiet).success(draw, looked_at, outputs, **quiet)
        moved = [part.input for part in (step, layer, unit, shown, opacity)]
        gr.on(moved, draw, looked_at, outputs, trigger_mode="always_last", **quiet)
    return page


def _shown(size: tuple[int, int] | None) -> str:
    return "" if size is None else f"{size[0]}x{size[1]}"


@contextmanager
def _said() -> Iterator[None]:
    """What the trainer refuses is said in the page."""
    try:
        yield
    except TrainerError as error:
        raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
