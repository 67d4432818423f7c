"""Checkpoints that are whole or not there: safetensors and JSON in a folder, checked against a manifest, never pickle.

A checkpoint is written into ``iteration_000012.partial`` and gets its name by one rename after everything, the
manifest last, has reached the disk. A process killed at any point leaves the checkpoint before it as it was.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from star_trainer.config import TrainerError
from star_trainer.run.files import file_digest

FORMAT = 1

_MANIFEST = "manifest.json"
_STATE = "state.json"
_PARTIAL = ".partial"
# The older of two checkpoints of one iteration, while the newer takes its place.
_REPLACED = ".replaced"
# Later ones than the one just saved: their run went back to an earlier checkpoint.
_ABANDONED = ".abandoned"
_FOLDER = re.compile(r"iteration_(\d{6,})(\.replaced)?")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_log = logging.getLogger(__name__)


class CheckpointError(TrainerError, RuntimeError):
    """Checkpoints are there but cannot be used: none is whole, or they do not fit."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read from disk: `tensors` by file and name, on the CPU, and the JSON `values`."""

    iteration: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]
    path: Path


class _DamageError(Exception):
    pass


def save_checkpoint(
    root: Path,
    iteration: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    values: Mapping[str, Any],
    *,
    keep: int = 2,
) -> Path:
    """Write the checkpoint of an iteration, whole or not at all, and return its folder.

    Args:
        root: the folder that holds the checkpoints; made if missing.
        iteration: at least 0. A checkpoint of the same iteration is replaced; later ones, which a resumed run has
            left behind, are set aside under another name.
        tensors: per file ``NAME.safetensors`` its tensors, any shape, dtype and device, also views of each other.
        values: what JSON can hold; tuples come back as lists.
        keep: how many checkpoints stay, this one included. Older ones are removed once this one is on the disk.

    Raises:
        OSError: writing failed, as on a full disk. The checkpoints that were there are untouched.
        TypeError: `values` holds something that is not JSON.
        ValueError: a bad name, iteration or keep.
    """
    partial = begin(root, iteration)
    try:
        for name, entries in tensors.items():
            add(partial, name, entries)
        return commit(partial, values, keep=keep)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def begin(root: Path, iteration: int) -> Path:
    """Make the folder that a checkpoint is written into, and remove what killed runs have left.

    With several processes one of them calls `begin` and, after all have called `add`, `commit`; barriers between
    the three are the caller's. The others know the folder as `partial_folder`.
    """
    partial = partial_folder(root, iteration)
    partial.parent.mkdir(parents=True, exist_ok=True)
    for stale in partial.parent.glob(f"iteration_*{_PARTIAL}"):
        _discard(stale)
    # What could not be removed of it is written over, or is in no manifest.
    partial.mkdir(exist_ok=True)
    return partial


def partial_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is written before it is committed."""
    if iteration < 0:
        raise ValueError(f"iteration: expected at least 0, got {iteration}")
    return Path(root) / f"iteration_{iteration:06d}{_PARTIAL}"


def add(partial: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write ``NAME.safetensors`` into a folder that `begin` made, down to the disk."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: expected letters, digits, '_', '-' and '.', got {name!r}")
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # The format has no views: what shares memory is written as often as it has names.
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        plain[key] = value
    path = partial / f"{name}.safetensors"
    try:
        save_file(plain, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    _sync(path)


def commit(partial: Path, values: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Complete a checkpoint that all processes have added their files to, and remove the older ones beyond `keep`."""
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    _write_json(partial / _STATE, values)
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(partial.iterdir())
        if path.name != _MANIFEST and _NAME.fullmatch(path.name)
    }
    target = partial.with_name(partial.name.removesuffix(_PARTIAL))
    iteration = _place(target)[0]
    _write_json(partial / _MANIFEST, {"format": FORMAT, "iteration": iteration, "files": files})
    _sync(partial)
    if target.exists():
        replaced = target.with_name(target.name + _REPLACED)
        if replaced.exists():
            _remove(replaced)
        os.rename(target, replaced)
    os.rename(partial, target)
    _sync(target.parent)

    kept = 1
    for path in _folders(target.parent):
        number, original = _place(path)
        if number > iteration:
            aside = path.with_name(path.name + _ABANDONED)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(path, aside)
            _log.warning("%s: later than iteration %d, just saved; set aside as %s", path, iteration, aside.name)
        elif original and (path == target or kept < keep):
            kept += path != target
        else:
            _remove(path)
    for aside in target.parent.glob(f"iteration_*{_ABANDONED}"):
        # The run has come as far again.
        if int(aside.name.split(".")[0].removeprefix("iteration_")) <= iteration:
            _discard(aside)
    return target


def load_iteration(root: Path, iteration: int) -> Checkpoint | None:
    """Read the checkpoint of an iteration; None if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    for path in _folders(Path(root)):
        if _place(path)[0] == iteration:
            try:
                return _read(path)
            except _DamageError as damage:
                raise CheckpointError(str(damage)) from damage
    return None


def iterations(root: Path) -> list[int]:
    """Those of which there is a checkpoint, whole or not, the newest first."""
    return list(dict.fromkeys(_place(path)[0] for path in _folders(Path(root))))


def load_latest(root: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is whole; None if there is none at all.

    Each newer one that is damaged is reported by a warning that names the file and what is wrong with it.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    damages: list[str] = []
    for path in _folders(Path(root)):
        try:
            return _read(path)
        except _DamageError as damage:
            damages.append(str(damage))
            _log.warning("checkpoint passed over: %s", damage)
    if not damages:
        return None
    raise CheckpointError(
        f"{root}: none of {len(damages)} checkpoints is whole ({'; '.join(damages)}). "
        "Training does not start anew over them: move the folder away if that is what you want"
    )


def set_aside(root: Path) -> None:
    """Give a folder of checkpoints or snapshots another name, so that a run that starts anew never takes up any."""
    if not root.is_dir():
        return
    number = 1
    while (target := root.with_name(f"{root.name}.old{number}")).exists():
        number += 1
    os.rename(root, target)
    _log.warning("%s: starting anew; what was there is now in %s", root, target)


def optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of a torch optimizer (also wrapped by accelerate) as named tensors, not copied, and JSON values."""
    inner = getattr(optimizer, "optimizer", optimizer)
    packed = inner.state_dict()
    tensors: dict[str, Tensor] = {}

    def plain(prefix: str, entries: Mapping[str, Any]) -> dict[str, Any]:
        tensors.update({f"{prefix}.{key}": value for key, value in entries.items() if isinstance(value, Tensor)})
        return {key: value for key, value in entries.items() if not isinstance(value, Tensor)}

    values = {
        "class": type(inner).__name__,
        "parameters": _signature(inner),
        "groups": [plain(f"groups.{index}", group) for index, group in enumerate(packed["param_groups"])],
        "state": {str(index): plain(f"state.{index}", entries) for index, entries in packed["state"].items()},
    }
    return tensors, values


def load_optimizer_state(
    optimizer: Any,
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
    place: Callable[[Tensor, Tensor], Tensor] = lambda value, parameter: value,
) -> None:
    """Put what `optimizer_state` gave, bit for bit, into an optimizer over the same parameters.

    `place` takes a tensor of the state and its parameter and returns what the optimizer of this process keeps of it.

    Raises:
        CheckpointError: another class of optimizer, other groups, or parameters of other shapes or dtypes.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if values["class"] != type(inner).__name__:
        raise CheckpointError(f"optimizer: expected the state of {type(inner).__name__}, got that of {values['class']}")
    sizes = [len(group["params"]) for group in inner.param_groups]
    saved_sizes = [len(group["params"]) for group in values["groups"]]
    if saved_sizes != sizes:
        raise CheckpointError(f"optimizer: expected groups of {sizes} parameters, got {saved_sizes}")
    for index, (saved, current) in enumerate(zip(values["parameters"], _signature(inner), strict=True)):
        if saved != current:
            raise CheckpointError(f"optimizer: expected parameter {index} to be {current}, got {saved}")
    groups: list[dict[str, Any]] = [dict(group) for group in values["groups"]]
    for group, existing in zip(groups, inner.param_groups, strict=True):
        # JSON has no tuples; betas are one.
        group.update({k: tuple(v) for k, v in group.items() if isinstance(existing.get(k), tuple)})
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in values["state"].items()}
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for name, tensor in tensors.items():
        kind, number, key = name.split(".", 2)
        if kind == "state":
            state[int(number)][key] = place(tensor.clone(), parameters[int(number)])
        else:
            groups[int(number)][key] = tensor.clone()
    inner.load_state_dict({"state": state, "param_groups": groups})
    for index, entries in state.items():
        loaded = inner.state[parameters[index]]
        for key, value in entries.items():
            # torch casts state to the parameter's dtype; an optimizer that keeps fp32 state for bf16 would lose bits.
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of the global generators of this process: Python, numpy, torch on the CPU and on every CUDA device.

    All that differs between processes is in the tensors, so that each can add its own file to a checkpoint.
    """
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    twister = legacy["state"]
    tensors = {
        "python": torch.tensor(internal, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*twister["key"].tolist(), twister["pos"], legacy["has_gauss"]], dtype=torch.int64),
        "numpy_gauss": torch.tensor([legacy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": version, "numpy": legacy["bit_generator"]}


def set_rng_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Set the generators to what `rng_state` gave; a warning where the CUDA devices are not as many as they were."""
    internal, gauss = tensors["python"].tolist(), tensors["python_gauss"].tolist()
    random.setstate((values["python"], tuple(internal), gauss[0] if gauss else None))
    *keys, position, has_gauss = tensors["numpy"].tolist()
    np.random.set_state(
        (values["numpy"], np.array(keys, dtype=np.uint32), position, has_gauss, tensors["numpy_gauss"].item())
    )
    torch.set_rng_state(tensors["torch"])
    saved = sum(name.startswith("cuda.") for name in tensors)
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if saved != present:
        _log.warning("random state of %d CUDA devices restored on %d: CUDA draws will differ", saved, present)
    for index in range(min(saved, present)):
        torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)


def _signature(optimizer: torch.optim.Optimizer) -> list[list[Any]]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [[list(parameter.shape), str(parameter.dtype).removeprefix("torch.")] for parameter in parameters]


def _folders(root: Path) -> list[Path]:
    """Committed checkpoints, whole or not, the newest first."""
    found = [path for path in root.iterdir() if _FOLDER.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=_place, reverse=True)


def _place(path: Path) -> tuple[int, bool]:
    """The order of checkpoints: by iteration, and one that is being replaced before its replacement."""
    match = _FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2] is None


def _read(path: Path) -> Checkpoint:
    manifest_path = path / _MANIFEST
    manifest = _read_json(manifest_path)
    if manifest.get("format") != FORMAT:
        raise _DamageError(f"{manifest_path}: expected format {FORMAT}, got {manifest.get('format')!r}")
    files, iteration = manifest.get("files"), _place(path)[0]
    if manifest.get("iteration") != iteration:
        raise _DamageError(f"{manifest_path}: expected iteration {iteration}, got {manifest.get('iteration')!r}")
    if not isinstance(files, dict) or _STATE not in files or not all(map(_NAME.fullmatch, files)):
        raise _DamageError(f"{manifest_path}: expected the names of its files, {_STATE} among them")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, recorded in files.items():
        file = path / name
        if not isinstance(recorded, dict) or not {"size", "sha256"} <= recorded.keys():
            raise _DamageError(f"{manifest_path}: expected size and sha256 of {name}, got {recorded!r}")
        try:
            size = file.stat().st_size
            if size != recorded["size"]:
                raise _DamageError(f"{file}: expected {recorded['size']} bytes, found {size}")
            if file_digest(file) != recorded["sha256"]:
                raise _DamageError(f"{file}: its content is not what was written (sha256 differs)")
            if file.suffix == ".safetensors":
                # Copied out of the mapped file, which may be removed or truncated while the tensors are in use.
                tensors[file.stem] = {key: value.clone() for key, value in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise _DamageError(f"{file}: {type(error).__name__}: {error}") from error
    return Checkpoint(iteration, tensors, _read_json(path / _STATE), path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _DamageError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise _DamageError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(content), indent=1), encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Have a file or the entries of a folder on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed meanwhile, it leaves a partial folder rather than a damaged checkpoint."""
    stale = path.with_name(path.name + _PARTIAL)
    try:
        os.rename(path, stale)
    except OSError as error:
        _log.warning("%s is not needed any more and cannot be removed: %s", path, error)
        return
    _discard(stale)


def _discard(path: Path) -> None:
    """Remove a folder as far as that goes: a network file system keeps files that somebody has open."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        _log.warning("%s is not needed any more and cannot be removed: %s", path, error)
