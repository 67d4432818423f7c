"""Checkpoints are whole or not there, whatever happens while they are written and to their files afterwards."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from star_trainer.run import checkpoint
from star_trainer.run.checkpoint import (
    CheckpointError,
    load_latest,
    load_optimizer_state,
    optimizer_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from torch import Tensor

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def content(iteration: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors and values that tell which iteration they are from."""
    tensors = {
        "adapter": {"layer.a": torch.full((4, 3), float(iteration)), "layer.b": torch.full((3,), -float(iteration))},
        "average": {"layer.a": torch.full((4, 3), iteration / 2)},
    }
    return tensors, {"iteration": iteration, "note": "ω"}


def save(root: Path, iteration: int, keep: int = 2) -> Path:
    return save_checkpoint(root, iteration, *content(iteration), keep=keep)


def loaded_iteration(root: Path) -> int:
    """The iteration of the newest whole checkpoint, with every part of it looked at."""
    found = load_latest(root)
    assert found is not None
    tensors, values = content(found.iteration)
    assert found.values == values
    assert found.tensors.keys() == tensors.keys()
    for name, entries in tensors.items():
        assert found.tensors[name].keys() == entries.keys()
        for key, tensor in entries.items():
            assert torch.equal(found.tensors[name][key], tensor)
    return found.iteration


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=generator)
    tensor = raw.to(torch.uint8).view(dtype).reshape(shape)
    save_checkpoint(tmp_path, 3, {"file": {"tensor": tensor}}, {})
    found = load_latest(tmp_path)
    assert found is not None
    assert same_bits(found.tensors["file"]["tensor"], tensor)


def test_special_values_come_back_bit_for_bit(tmp_path: Path) -> None:
    tensor = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3.4e38])
    save_checkpoint(tmp_path, 0, {"file": {"tensor": tensor}}, {"nan": float("nan"), "tenth": 0.1, "small": 5e-324})
    found = load_latest(tmp_path)
    assert found is not None
    assert same_bits(found.tensors["file"]["tensor"], tensor)
    assert found.values["nan"] != found.values["nan"]
    assert (found.values["tenth"], found.values["small"]) == (0.1, 5e-324)


def test_views_parameters_and_strided_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    entries = {
        "base": base,
        "same": base,
        "rows": base[1:3],
        "transposed": base.T,
        "expanded": base[:1].expand(3, 6),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    save_checkpoint(tmp_path, 1, {"file": entries}, {})
    found = load_latest(tmp_path)
    assert found is not None
    for name, tensor in entries.items():
        assert torch.equal(found.tensors["file"][name], tensor), name


def test_a_checkpoint_has_its_place_and_no_file_without_tensors_is_lost(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "deep" / "run", 12, {"empty": {}}, {"tree": {"list": [1, None, True, "x"]}})
    assert path == tmp_path / "deep" / "run" / "iteration_000012"
    found = load_latest(tmp_path / "deep" / "run")
    assert found is not None
    assert (found.iteration, found.path, found.tensors) == (12, path, {"empty": {}})
    assert found.values == {"tree": {"list": [1, None, True, "x"]}}


def test_loaded_tensors_outlive_their_files(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    found = load_latest(tmp_path)
    assert found is not None
    with (path / "adapter.safetensors").open("r+b") as file:
        file.truncate(0)
    shutil.rmtree(path)
    assert torch.equal(found.tensors["adapter"]["layer.a"], torch.ones(4, 3))


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    (tmp_path / "iteration_x").mkdir()
    assert load_latest(tmp_path) is None


def test_the_newest_is_the_one_of_the_highest_iteration_not_of_the_last_name(tmp_path: Path) -> None:
    save(tmp_path, 999_999, keep=5)
    save(tmp_path, 1_000_000, keep=5)
    assert loaded_iteration(tmp_path) == 1_000_000


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_older_checkpoints_beyond_keep_are_removed(tmp_path: Path, keep: int) -> None:
    for iteration in range(1, 6):
        save(tmp_path, iteration, keep=keep)
    assert names(tmp_path) == [f"iteration_{iteration:06d}" for iteration in range(6 - keep, 6)]


def test_saving_an_iteration_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    tensors = {"adapter": {"x": torch.ones(1)}}
    for value in (1, 2, 3):
        save_checkpoint(tmp_path, 2, tensors, {"value": value})
        found = load_latest(tmp_path)
        assert found is not None and found.values == {"value": value}
        assert names(tmp_path) == ["iteration_000001", "iteration_000002"]


def test_later_checkpoints_of_a_run_that_went_back_are_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 3)
    later = save(tmp_path, 9)
    (later / "adapter.safetensors").unlink()
    assert loaded_iteration(tmp_path) == 3
    caplog.clear()
    save(tmp_path, 5)
    assert "iteration_000009.abandoned" in caplog.text
    assert names(tmp_path) == ["iteration_000003", "iteration_000005", "iteration_000009.abandoned"]
    caplog.clear()
    assert loaded_iteration(tmp_path) == 5
    assert caplog.text == ""
    save(tmp_path, 8)
    assert "iteration_000009.abandoned" in names(tmp_path)
    save(tmp_path, 9)
    assert names(tmp_path) == ["iteration_000008", "iteration_000009"]


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return edit


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": ("adapter.safetensors", lambda path: os.truncate(path, path.stat().st_size - 1), "bytes"),
    "empty": ("adapter.safetensors", lambda path: os.truncate(path, 0), "found 0"),
    "longer": ("average.safetensors", lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes"),
    "a flipped bit in tensors": ("average.safetensors", flip_a_bit, "sha256"),
    "a flipped bit in values": ("state.json", flip_a_bit, "sha256"),
    "tensors missing": ("adapter.safetensors", Path.unlink, "No such file"),
    "values missing": ("state.json", Path.unlink, "No such file"),
    "manifest missing": ("manifest.json", Path.unlink, "No such file"),
    "manifest empty": ("manifest.json", lambda path: path.write_bytes(b""), "JSONDecodeError"),
    "manifest cut": ("manifest.json", lambda path: os.truncate(path, 40), "JSONDecodeError"),
    "manifest of bytes": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "UnicodeDecodeError"),
    "manifest a list": ("manifest.json", lambda path: path.write_text("[]"), "JSON object"),
    "manifest without files": ("manifest.json", edit_manifest(lambda m: m.pop("files")), "names of its files"),
    "manifest without state": ("manifest.json", edit_manifest(lambda m: m["files"].pop("state.json")), "state.json"),
    "manifest without sizes": ("manifest.json", edit_manifest(lambda m: m["files"].update({"state.json": 3})), "state"),
    "manifest of elsewhere": ("manifest.json", edit_manifest(lambda m: m["files"].update({"../x": {}})), "names"),
    "another iteration": (
        "manifest.json",
        edit_manifest(lambda m: m.update(iteration=7)),
        "expected iteration 2, got 7",
    ),
    "another format": ("manifest.json", edit_manifest(lambda m: m.update(format=99)), "expected format 1, got 99"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    name, spoil, complaint = DAMAGES[damage]
    save(tmp_path, 1)
    spoil(save(tmp_path, 2) / name)
    with caplog.at_level(logging.WARNING):
        assert loaded_iteration(tmp_path) == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(tmp_path / "iteration_000002" / name) in record.getMessage()
    assert complaint in record.getMessage()


def test_a_file_in_the_place_of_a_checkpoint_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    (tmp_path / "iteration_000002").write_text("")
    assert loaded_iteration(tmp_path) == 1
    assert "iteration_000002" in caplog.text


def test_without_a_whole_checkpoint_the_error_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    os.truncate(save(tmp_path, 1) / "state.json", 1)
    (save(tmp_path, 2) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole") as error:
        load_latest(tmp_path)
    assert str(tmp_path / "iteration_000001" / "state.json") in str(error.value)
    assert str(tmp_path / "iteration_000002" / "manifest.json") in str(error.value)


STAGES = ("open", "fsync", "rename", "mkdir", "rmdir", "unlink")


@contextmanager
def at_call(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> Iterator[list[str]]:
    """Run `act` before the `number`-th call that changes the disk; gives the list of the calls that were made."""
    calls: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(name)
            if len(calls) - 1 == number:
                act()
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patched:
        for name in STAGES:
            patched.setattr(os, name, watched(name, getattr(os, name)))
        patched.setattr(checkpoint, "save_file", watched("save_file", checkpoint.save_file))
        yield calls


def recorded_calls(monkeypatch: pytest.MonkeyPatch, root: Path, prepare: Callable[[Path], None]) -> list[str]:
    prepare(root)
    with at_call(monkeypatch, -1, lambda: None) as calls:
        save(root, 2, keep=1)
    assert {"save_file", "fsync", "rename", "unlink", "rmdir"} <= set(calls)
    return calls


def one_before(root: Path) -> None:
    save(root, 1)


def same_iteration_before(root: Path) -> None:
    save(root, 2)


@pytest.mark.parametrize("prepare", [one_before, same_iteration_before])
def test_a_kill_at_any_point_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Path], None]
) -> None:
    # What a killed process has written stays without it; only a machine that goes down needs the disk to be reached.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    total = len(recorded_calls(monkeypatch, tmp_path / "count", prepare))
    assert total > 15
    seen = set()
    for number in range(total):
        root = tmp_path / str(number)
        prepare(root)
        child = os.fork()
        if child == 0:
            try:
                with at_call(monkeypatch, number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                    save(root, 2, keep=1)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        seen.add(loaded_iteration(root))
        # The next save of the resumed run clears up.
        save(root, 2, keep=1)
        assert names(root) == ["iteration_000002"]
        assert loaded_iteration(root) == 2
    assert seen == ({1, 2} if prepare is one_before else {2})


@pytest.mark.parametrize("prepare", [one_before, same_iteration_before])
def test_an_error_while_saving_propagates_and_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Path], None]
) -> None:
    calls = recorded_calls(monkeypatch, tmp_path / "count", prepare)
    on_disk = len(calls) - calls[::-1].index("fsync")

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # From the second call on: the first makes the folder, which is there already.
    for number in range(1, on_disk):
        root = tmp_path / str(number)
        prepare(root)
        with at_call(monkeypatch, number, full), pytest.raises(OSError, match="No space left") as error:
            save(root, 2, keep=1)
        assert error.value.errno == errno.ENOSPC
        assert loaded_iteration(root) in (1, 2)
        # Until the rename nothing of the failed one remains; after it the new one counts.
        if loaded_iteration(root) == 1:
            assert names(root) == ["iteration_000001"]


@pytest.mark.parametrize("prepare", [one_before, same_iteration_before])
def test_what_cannot_be_removed_is_said_and_fails_no_save(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = recorded_calls(monkeypatch, tmp_path / "count", prepare)

    def busy() -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    for number in range(len(calls) - calls[::-1].index("fsync"), len(calls)):
        root = tmp_path / str(number)
        prepare(root)
        caplog.clear()
        with at_call(monkeypatch, number, busy):
            save(root, 2, keep=1)
        assert "cannot be removed: [Errno 16] Device or resource busy" in caplog.text
        assert loaded_iteration(root) == 2
        # The next save has another try.
        save(root, 3, keep=1)
        assert names(root) == ["iteration_000003"]


def test_a_real_failure_to_write_is_an_os_error_and_cleans_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(OSError) as error:
            save_checkpoint(tmp_path, 2, {"large": {"x": torch.zeros(1 << 16)}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG
    assert "large.safetensors" in str(error.value)
    assert names(tmp_path) == ["iteration_000001"]
    assert loaded_iteration(tmp_path) == 1


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_anything_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with at_call(monkeypatch, -1, lambda: None) as calls:
        save(tmp_path, 2, keep=1)
    # Three files, the manifest and their folder; then the rename and the folder that it changed.
    rename = calls.index("rename")
    assert calls[:rename].count("fsync") == 6 - 1
    assert "unlink" not in calls[:rename] and "rmdir" not in calls[:rename]
    assert calls[rename + 1 : rename + 3] == ["open", "fsync"]


def test_what_a_killed_run_left_is_never_read_and_removed_by_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "iteration_000001", tmp_path / "iteration_000007.partial")
    (tmp_path / "iteration_000008.partial").mkdir()
    assert loaded_iteration(tmp_path) == 1
    save(tmp_path, 2)
    assert names(tmp_path) == ["iteration_000001", "iteration_000002"]


def test_several_processes_add_their_files_to_one_checkpoint(tmp_path: Path) -> None:
    partial = checkpoint.begin(tmp_path, 4)
    checkpoint.add(partial, "rng_0000", {"x": torch.zeros(2)})
    child = os.fork()
    if child == 0:
        try:
            checkpoint.add(checkpoint.partial_folder(tmp_path, 4), "rng_0001", {"x": torch.ones(2)})
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert load_latest(tmp_path) is None
    checkpoint.commit(partial, {"processes": 2})
    found = load_latest(tmp_path)
    assert found is not None
    assert found.values == {"processes": 2}
    assert {name: entries["x"].tolist() for name, entries in found.tensors.items()} == {
        "rng_0000": [0.0, 0.0],
        "rng_0001": [1.0, 1.0],
    }


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"iteration": -1}, ValueError, "iteration: expected at least 0, got -1"),
        ({"keep": 0}, ValueError, "keep: expected at least 1, got 0"),
        ({"tensors": {"../evil": {}}}, ValueError, "name: expected .* got '../evil'"),
        ({"tensors": {"": {}}}, ValueError, "name: expected"),
        ({"values": {"x": torch.zeros(1)}}, TypeError, "JSON"),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(
    tmp_path: Path, change: dict[str, Any], kind: type[Exception], words: str
) -> None:
    save(tmp_path, 1)
    arguments: dict[str, Any] = {"iteration": 2, "tensors": {}, "values": {}} | change
    with pytest.raises(kind, match=words):
        save_checkpoint(tmp_path, **arguments)
    assert names(tmp_path) == ["iteration_000001"]


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).to(dtype)


def adamw(net: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    first, second = net[0].parameters(), net[2].parameters()  # type: ignore[index, operator]
    groups = [{"params": list(first), "lr": 0.01}, {"params": list(second), "lr": 0.003, "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, betas=(0.8, 0.95), **options)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        data = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        net(data).square().sum().backward()
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw fused": lambda net: adamw(net, fused=True),
    "adamw foreach": lambda net: adamw(net, foreach=True),
    "adamw amsgrad": lambda net: adamw(net, amsgrad=True, maximize=True),
    "adamw lr tensor": lambda net: torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.01)),
    "sgd momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9),
    "adagrad": lambda net: torch.optim.Adagrad(net.parameters(), lr=0.01),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_goes_on_as_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    straight = model(dtype)
    optimizer = OPTIMIZERS[name](straight)
    train(straight, optimizer, range(3))
    optimizer.param_groups[0]["weight_decay"] = 0.123456789
    tensors, values = optimizer_state(optimizer)
    weights = dict(straight.named_parameters())
    save_checkpoint(tmp_path, 3, {"policy": weights, "optimizer": tensors}, {"optimizer": values})
    train(straight, optimizer, range(3, 8))

    found = load_latest(tmp_path)
    assert found is not None
    resumed = model(dtype)
    resumed.load_state_dict(found.tensors["policy"])
    other = OPTIMIZERS[name](resumed)
    # State of its own, which must go.
    train(resumed, other, range(20, 22))
    resumed.load_state_dict(found.tensors["policy"])
    load_optimizer_state(other, found.tensors["optimizer"], found.values["optimizer"])
    train(resumed, other, range(3, 8))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert same_bits(a, b)
    left, right = optimizer.state_dict(), other.state_dict()
    assert left["param_groups"] == right["param_groups"]
    for before, after in zip(left["param_groups"], right["param_groups"], strict=True):
        assert {key: type(value) for key, value in before.items()} == {key: type(value) for key, value in after.items()}
    for index, entries in left["state"].items():
        assert entries.keys() == right["state"][index].keys()
        for key, value in entries.items():
            loaded = right["state"][index][key]
            assert same_bits(value, loaded) if isinstance(value, Tensor) else value == loaded


def test_optimizer_state_of_another_dtype_than_the_parameters_is_kept(tmp_path: Path) -> None:
    net = model(torch.bfloat16)
    optimizer = adamw(net)
    train(net, optimizer, range(1))
    for entries in optimizer.state.values():
        entries["exp_avg"] = entries["exp_avg"].float() + 1e-6
    tensors, values = optimizer_state(optimizer)
    other = adamw(model(torch.bfloat16))
    load_optimizer_state(other, tensors, json.loads(json.dumps(values)))
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert same_bits(a["exp_avg"], b["exp_avg"])


def test_a_loaded_optimizer_does_not_write_into_the_checkpoint() -> None:
    net = model()
    optimizer = adamw(net)
    train(net, optimizer, range(2))
    tensors, values = optimizer_state(optimizer)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    copied_values = json.dumps(values)
    kept = dict(copies)
    other = model()
    loaded = adamw(other)
    load_optimizer_state(loaded, copies, values)
    train(other, loaded, range(2, 4))
    assert all(torch.equal(copies[name], tensors[name]) for name in kept)
    assert json.dumps(values) == copied_values


def test_parameters_without_a_step_yet_stay_without_state() -> None:
    tensors, values = optimizer_state(adamw(model()))
    assert tensors == {}
    optimizer = adamw(model())
    load_optimizer_state(optimizer, tensors, values)
    assert optimizer.state_dict()["state"] == {}


def test_an_optimizer_wrapped_by_accelerate_is_saved_and_loaded() -> None:
    from accelerate import Accelerator

    net = model()
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(adamw(net))
    train(net, optimizer, range(2))
    tensors, values = optimizer_state(optimizer)
    assert values["class"] == "AdamW"
    plain = adamw(model())
    load_optimizer_state(plain, tensors, values)
    wrapped = accelerator.prepare(adamw(model()))
    load_optimizer_state(wrapped, tensors, values)
    for other in (plain, wrapped):
        assert optimizer_state(other)[0].keys() == tensors.keys()
        assert all(same_bits(tensor, tensors[name]) for name, tensor in optimizer_state(other)[0].items())


def test_optimizer_state_that_does_not_fit_is_refused() -> None:
    net = model()
    optimizer = adamw(net)
    train(net, optimizer, range(1))
    tensors, values = optimizer_state(optimizer)
    wider = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    cases: list[tuple[torch.optim.Optimizer, str]] = [
        (torch.optim.SGD(model().parameters(), lr=0.1), "expected the state of SGD, got that of AdamW"),
        (torch.optim.AdamW(model().parameters()), r"expected groups of \[4\] parameters, got \[2, 2\]"),
        (adamw(wider), r"expected parameter 0 to be \[\[8, 5\], 'float32'\], got \[\[7, 5\], 'float32'\]"),
        (adamw(model(torch.bfloat16)), "expected parameter 0 .*bfloat16.* got .*float32"),
    ]
    for other, words in cases:
        before = json.dumps(optimizer_state(other)[1])
        with pytest.raises(CheckpointError, match=f"optimizer: {words}"):
            load_optimizer_state(other, tensors, values)
        assert json.dumps(optimizer_state(other)[1]) == before


@pytest.fixture
def global_generators() -> Iterator[None]:
    """The test draws from the global generators; the tests after it see them as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def draws() -> list[Any]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(3).tolist(),
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
        torch.randperm(9).tolist(),
    ]


@pytest.mark.usefixtures("global_generators")
@pytest.mark.parametrize("odd", [False, True], ids=["fresh", "after one normal draw"])
def test_generators_go_on_as_they_would_have(tmp_path: Path, odd: bool) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    if odd:
        # Each leaves a second normal number, or half of a buffer, for the next draw.
        random.gauss(0, 1), np.random.randn(1), torch.randn(1)
    tensors, values = rng_state()
    save_checkpoint(tmp_path, 1, {"rng": tensors}, {"rng": values})
    expected = draws()
    assert draws() != expected
    found = load_latest(tmp_path)
    assert found is not None
    set_rng_state(found.tensors["rng"], found.values["rng"])
    assert draws() == expected


@pytest.mark.usefixtures("global_generators")
def test_reading_the_generators_changes_nothing() -> None:
    torch.manual_seed(3)
    random.seed(1)
    np.random.seed(2)
    expected = draws()
    torch.manual_seed(3)
    random.seed(1)
    np.random.seed(2)
    rng_state()
    assert draws() == expected


@pytest.mark.usefixtures("global_generators")
def test_a_state_of_other_devices_is_set_as_far_as_it_goes_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tensors, values = rng_state()
    devices = sum(name.startswith("cuda.") for name in tensors)
    set_rng_state(tensors, values)
    assert caplog.text == ""
    set_rng_state(tensors | {f"cuda.{devices}": torch.zeros(16, dtype=torch.uint8)}, values)
    assert f"{devices + 1} CUDA devices restored on {devices}" in caplog.text
