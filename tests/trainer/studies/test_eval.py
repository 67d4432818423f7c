"""star-eval: base against adapter from the same noise, in GenEval's folders, resumable, with intervals."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from star_trainer.config import load_config
from star_trainer.run.statistics import bootstrap_mean
from star_trainer.studies.evaluate import gallery as galleries
from star_trainer.studies.evaluate.cli import main
from star_trainer.studies.evaluate.tables import markdown, tabulate
from star_trainer.train import train

from tests.trainer.forked import run_forked

TRAINED = [
    "run.progress=false",
    "method=uniform",
    "train.iterations=1",
    "train.learning_rate=1e-2",
    "train.ema_decay=0.0",
    "rollout.prompts=2",
    "rollout.samples=4",
    "rollout.steps=3",
    "rollout.sde_steps=2",
    "rollout.batch_size=8",
    "evaluation.prompts=2",
    "evaluation.interim_prompts=2",
    "evaluation.steps=3",
    "evaluation.pictures=2",
    "reward.terms={clip_score: 1.0}",
    "reward.models.clip=tiny",
]
# Of the six that are drawn one comes twice.
COUNT, SAMPLES = 5, 2
SMALL = ["--count", "6", "--samples", str(SAMPLES), "--rewards", "scene_strict,scene_graded"]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose adapter changes pictures visibly."""
    folder = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(load_config("tiny", [f"run.folder={folder}", *TRAINED]))
    return folder


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated")
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--rewards", "scene_graded,clip_score", "reward.models.clip=tiny", "--out", str(out)]
    assert main([str(run), *SMALL, *arguments]) == 0
    return out


def pictures(root: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(root)): np.asarray(Image.open(path)) for path in sorted(root.rglob("*.png"))}


def test_pictures_are_where_genevals_scorer_looks(evaluated: Path) -> None:
    for root in (evaluated / "base", evaluated / "adapter"):
        folders = [path for path in root.iterdir() if path.is_dir()]
        assert sorted(path.name for path in folders) == [f"{place:05d}" for place in range(COUNT)]
        for folder in folders:
            metadata = json.loads((folder / "metadata.jsonl").read_text())
            assert {"tag", "prompt", "include"} <= metadata.keys()
            files = [path.name for path in (folder / "samples").iterdir()]
            assert len(files) == SAMPLES and all(re.match(r"\d+\.png", name) for name in files)


def test_a_files_metadata_is_kept_and_a_prompt_that_comes_again_counts_once(tmp_path: Path) -> None:
    lines = [
        {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
        {"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a square"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    options = ["--rewards", "scene_strict", "--samples", "1", "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(["tiny", "--prompts", str(file), *options]) == 0
    for place, line in enumerate(lines):
        assert json.loads((tmp_path / "out" / "base" / f"{place:05d}" / "metadata.jsonl").read_text()) == line
    assert len(pictures(tmp_path / "out")) == 2 and not (tmp_path / "out" / "adapter").exists()


def test_the_table_holds_both_models_and_their_paired_difference(run: Path, evaluated: Path) -> None:
    rows = json.loads((evaluated / "table.json").read_text())["rows"]
    lines = [json.loads(line) for line in (evaluated / "scores.jsonl").read_text().splitlines()]
    assert {row["reward"] for row in rows} == {"scene_graded", "clip_score"}
    assert len(lines) == 2 * COUNT * SAMPLES
    for reward in ("scene_graded", "clip_score"):
        of_tags = [row for row in rows if row["reward"] == reward and row["tag"] != "overall"]
        (overall,) = [row for row in rows if row["reward"] == reward and row["tag"] == "overall"]
        for model in ("base", "adapter"):
            for row in of_tags:
                values = [line[reward] for line in lines if line["model"] == model and line["tag"] == row["tag"]]
                assert row[model]["mean"] == pytest.approx(np.mean(values))
            assert overall[model]["mean"] == pytest.approx(np.mean([row[model]["mean"] for row in of_tags]))
        assert overall["difference"]["mean"] == pytest.approx(overall["adapter"]["mean"] - overall["base"]["mean"])
    assert Image.open(evaluated / "sheet.png").size[0] > 100
    assert "| clip_score" in (evaluated / "table.md").read_text()
    content = (evaluated / "report.html").read_text(encoding="utf-8")
    assert f"{overall['difference']['mean']:+.4f}" in content and content.count('src="data:image/png') == 2 * 2 + COUNT
    # Beside both models' pictures, how the trained one makes them: those in its folder, to the bit.
    data = json.loads(content.partition('id="data">')[2].partition("</script>")[0])
    for place, case in enumerate(data["cases"]):
        made = Image.open(io.BytesIO(base64.b64decode(case["pictures"][-1].partition(",")[2])))
        kept = Image.open(evaluated / "adapter" / f"{place:05d}" / "samples" / "0000.png")
        assert np.array_equal(np.asarray(made), np.asarray(kept)) and case["units"][0] == "all words"
    # Of the run, which has no maps.
    trained = (run / "report.html").read_text(encoding="utf-8")
    assert "The method uniform records no attention" in trained and '"units": []' in trained


def test_an_adapter_that_changes_nothing_gives_the_same_pictures(tmp_path: Path) -> None:
    from peft.utils import get_peft_model_state_dict
    from star_trainer.families.policy import load_policy

    policy = load_policy(load_config("tiny").model)
    policy.pipeline.save_lora_weights(tmp_path / "none", get_peft_model_state_dict(policy.transformer))
    options = ["--adapter", str(tmp_path / "none"), "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["tiny", *SMALL, *options]) == 0
    base, adapter = pictures(tmp_path / "out" / "base"), pictures(tmp_path / "out" / "adapter")
    assert len(base) == COUNT * SAMPLES
    assert all(np.array_equal(base[name], adapter[name]) for name in base)
    # Samples of a prompt differ.
    assert not np.array_equal(base["00000/samples/0000.png"], base["00000/samples/0001.png"])


def test_a_whole_transformer_is_compared_with_the_pipelines_own(tmp_path: Path) -> None:
    from star_trainer.families.policy import load_pipeline

    transformer = load_pipeline(load_config("tiny").model).transformer
    with torch.no_grad():
        transformer.proj_out.bias += 0.1
    transformer.save_pretrained(tmp_path / "transformer")
    options = ["--adapter", str(tmp_path / "transformer"), "--steps", "2", "--out", str(tmp_path / "out")]
    assert main(["tiny", *SMALL, *options]) == 0
    assert main(["tiny", *SMALL, "--steps", "2", "--out", str(tmp_path / "alone")]) == 0
    base, adapter = pictures(tmp_path / "out" / "base"), pictures(tmp_path / "out" / "adapter")
    assert any(not np.array_equal(base[name], adapter[name]) for name in base)
    alone = pictures(tmp_path / "alone" / "base")
    assert all(np.array_equal(base[name], alone[name]) for name in base)


def test_a_stopped_evaluation_goes_on_and_makes_no_picture_twice(
    run: Path, evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = galleries.Gallery.write

    def write(self: galleries.Gallery, place: tuple[int, int], image: np.ndarray) -> None:
        if len(made) == 13:
            raise KeyboardInterrupt
        made.append((self.root.name, place))
        real(self, place, image)

    monkeypatch.setattr(galleries.Gallery, "write", write)
    arguments = [str(run), *SMALL, "rollout.batch_size=4", "--out", str(tmp_path)]
    assert main(arguments) == 130
    assert len(pictures(tmp_path)) == 13
    made.clear()
    assert main(arguments) == 0
    assert len(made) == 2 * COUNT * SAMPLES - 13
    # Other batches, the same noise: the same pictures up to rounding.
    for model in ("base", "adapter"):
        expected = pictures(evaluated / model)
        for name, picture in pictures(tmp_path / model).items():
            np.testing.assert_allclose(picture.astype(float), expected[name], atol=1)
    made.clear()
    assert main(arguments) == 0
    assert not made


def test_two_processes_leave_the_files_of_one(tmp_path: Path) -> None:
    arguments = ["tiny", *SMALL, "--steps", "1", "rollout.batch_size=2", "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0
    expected = {path.relative_to(tmp_path / "one"): path for path in (tmp_path / "one").rglob("*") if path.is_file()}
    codes, printed = run_forked(main, [*arguments, str(tmp_path / "two")], processes=2)
    assert codes == [0, 0], printed
    assert "pictures, scores and tables are in" in printed[0] and "scores" not in printed[1]
    found = {path.relative_to(tmp_path / "two"): path for path in (tmp_path / "two").rglob("*") if path.is_file()}
    assert found.keys() == expected.keys()
    assert all(found[name].read_bytes() == expected[name].read_bytes() for name in expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--steps", "4"], "evaluation.steps"),
        (["--seed", "3"], "run.seed"),
        (["--guidance-scale", "2.0"], "evaluation.guidance_scale"),
        (["model.levels=even"], "model.levels"),
        (["model.vae_dtype=bfloat16"], "model.vae_dtype"),
    ],
)
def test_pictures_of_other_settings_are_not_taken_for_these(
    change: list[str], named: str, run: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in evaluated.rglob("*") if path.is_file()}
    assert main([str(run), *SMALL, *change, "--out", str(evaluated)]) == 2
    error = capsys.readouterr().err
    assert "--out" in error and named in error
    assert before == {path: path.read_bytes() for path in evaluated.rglob("*") if path.is_file()}


def test_a_damaged_picture_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tiny", *SMALL, "--steps", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    picture = tmp_path / "base" / "00002" / "samples" / "0001.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert main(arguments) == 2
    assert str(picture) in capsys.readouterr().err
    picture.unlink()
    assert main(arguments) == 0
    np.testing.assert_allclose(pictures(tmp_path)[str(picture.relative_to(tmp_path))].shape, (64, 64, 3))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tiny", "--rewards", "scene_strict"], "--out"),
        (["tiny", "nowhere", "--out", "o"], "nowhere"),
        (["no_such_preset", "--out", "o"], "no_such_preset"),
        (["tiny", "--rewards", "beauty", "--out", "o"], "beauty"),
        (["tiny", "--rewards", " , ", "--out", "o"], "--rewards"),
        (["tiny", "--samples", "0", "--out", "o"], "--samples"),
        (["tiny", "--count", "-1", "--out", "o"], "--count"),
        (["tiny", "--prompts", "missing.jsonl", "--out", "o"], "--prompts"),
        (["tiny", "--prompts", "plain.txt", "--rewards", "geneval", "--out", "o"], "--rewards"),
        (["tiny", "--adapter", "missing", "--out", "o"], "--adapter"),
        (["tiny", "--adapter", "empty", "--out", "o"], "--adapter"),
        (["tiny", "--adapter", "damaged", "--out", "o"], "--adapter"),
        (["tiny", "model.adapter=./missing", "--out", "o"], "model.adapter: no such folder: ./missing"),
        (["--pipeline", "missing", "--prompts", "plain.txt", "--rewards", "clip_score", "--out", "o",
          "reward.models.clip=tiny"], "model.pipeline"),
        (["tiny", "--resolution", "33", "--out", "o"], "model.resolution"),
        (["tiny", "--steps", "0", "--out", "o"], "evaluation.steps"),
        (["tiny", "evaluation.step=3", "--out", "o"], "evaluation.step"),
        (["unfinished", "--out", "o"], "checkpoint"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named_with_its_option(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("a red circle\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "pytorch_lora_weights.safetensors").write_bytes(b"not safetensors")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text(load_config("tiny").model_dump_json())
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("star-eval: ") and named in error
    assert not list(tmp_path.rglob("*.png"))


def test_the_mean_over_tags_weighs_tags_alike_and_intervals_cover() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(0.0, 1.0, 20), rng.normal(4.0, 1.0, 200)
    found = bootstrap_mean([few, many])
    assert found.value == pytest.approx((few.mean() + many.mean()) / 2)
    # Of a mean of two independent means, the normal interval.
    half = 1.96 * np.sqrt(few.var() / 20 + many.var() / 200) / 2
    assert found.low == pytest.approx(found.value - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.15 * half)
    alone = bootstrap_mean([np.array([0.5])])
    assert alone.value == 0.5 and np.isnan([alone.low, alone.high]).all()
    assert vars(bootstrap_mean([np.ones(5)])) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 5}


def test_samples_of_a_prompt_count_as_one_and_differences_are_paired() -> None:
    rng = np.random.default_rng(1)
    of_prompt = rng.normal(0.0, 1.0, (50, 1))
    base = {"score": of_prompt.repeat(4, axis=1)}
    adapter = {"score": base["score"] + 0.1}
    (row,) = tabulate({"base": base, "adapter": adapter}, [None] * 50)
    found = row.estimates
    assert row.tag == "overall" and row.prompts == 50
    assert found["base"] == bootstrap_mean([of_prompt[:, 0]])
    assert found["difference"].low == pytest.approx(0.1) and found["difference"].high == pytest.approx(0.1)
    assert found["base"].high - found["base"].low > 0.3
    assert "+0.1000 [+0.1000, +0.1000]" in markdown([row])
