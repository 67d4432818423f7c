"""Recording attention mass while a model of a known family runs (docs/method.md, section 3)."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from star_kernels._checks import check_choice, check_tensor
from star_kernels.attention import DIRECTIONS, joint_attention
from star_kernels.recorder import sd3
from star_kernels.recorder.family import Family, Layer
from star_kernels.text_units import TextUnits

# The family of a model, by the name of the model's class or of one that it derives from.
FAMILIES: dict[str, Family] = {sd3.MODEL: sd3}

_being_recorded: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class AttentionRecorder:
    """The attention mass of a transformer's forward passes, one per step: what `record_attention` gives.

    Attributes:
        layers: indices of the transformer blocks that are recorded.
        history: the masses that `next_step` has stored, one [rows, image tokens, K] tensor per step.
    """

    def __init__(
        self,
        unit_weights: Tensor | None,
        layers: list[int],
        rows: slice | tuple[int, int] | None,
        direction: Literal["image_to_text", "text_to_image"],
        backend: str,
    ) -> None:
        self.layers = layers
        self.history: list[Tensor] = []
        self._unit_weights = unit_weights
        self._to_send = None if unit_weights is None else _compact(unit_weights)
        self._rows = rows
        self._direction = direction
        self._backend = backend
        self._sum: Tensor | None = None
        self._captured: list[int] = []

    @property
    def mass(self) -> Tensor:
        """The current step's mass [rows, image tokens, K] float32, the mean over the recorded layers that ran.

        Image tokens stand in the order of the transformer's patches, row by row. The tensor carries no gradient.

        Raises:
            RuntimeError: the transformer has not run in this step, or there are no units to record.
        """
        if self._unit_weights is None:
            raise RuntimeError("mass: expected units to record, got units=None, which only runs the same attention")
        if self._sum is None:
            raise RuntimeError("mass: expected a forward pass of the recorded transformer in this step, got none yet")
        return self._sum / len(self._captured)

    def next_step(self) -> None:
        """Append the current step's mass to `history` and begin the next step.

        Raises:
            RuntimeError: the transformer has not run in this step.
        """
        self.history.append(self.mass)
        self.discard_step()

    def discard_step(self) -> None:
        """Forget what the current step has captured, as after a forward pass that failed or is not wanted."""
        self._sum = None
        self._captured = []

    def _attend(
        self,
        layer: int,
        name: str,
        recomputing: bool,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_image_tokens: int,
        text_first: bool,
    ) -> Tensor:
        """Attention of one joint block, [B, heads, N, D] to the same; its mass joins the current step's.

        A block that gradient checkpointing runs again computes the same things, so that autograd finds the tensors it
        expects, but its mass is dropped: it belongs to a step that is over or has this layer already.
        """
        if self._unit_weights is None:
            out, _ = joint_attention(
                query, key, value, num_image_tokens=num_image_tokens, text_first=text_first, backend=self._backend
            )
            return out
        if layer in self._captured and not recomputing:
            raise RuntimeError(
                f"{name}: expected one forward pass per step, got a second one; call next_step() on the "
                "recorder after each forward pass, or discard_step() where the last one is not wanted"
            )
        out, mass = joint_attention(
            query,
            key,
            value,
            self._unit_weights_for(self._unit_weights, query, num_image_tokens),
            num_image_tokens=num_image_tokens,
            text_first=text_first,
            mass=None if recomputing else self._sum,
            rows=self._row_range(query.shape[0], len(self._unit_weights)),
            direction=self._direction,
            backend=self._backend,
        )
        if not recomputing:
            self._sum = mass
            self._captured = [*self._captured, layer]
        return out

    def _unit_weights_for(self, unit_weights: Tensor, query: Tensor, num_image_tokens: int) -> Tensor:
        num_text_tokens = query.shape[2] - num_image_tokens
        if unit_weights.shape[1] != num_text_tokens:
            raise ValueError(
                f"units: expected weights for the {num_text_tokens} text tokens of this forward pass, got "
                f"{unit_weights.shape[1]}; make them with the tokenizers and lengths that encode the prompts"
            )
        if unit_weights.device != query.device:
            assert self._to_send is not None, "made together with the unit weights"
            unit_weights = self._unit_weights = self._to_send.to(query.device)
        return unit_weights

    def _row_range(self, batch: int, count: int) -> tuple[int, int]:
        if isinstance(self._rows, slice):
            first, end, _ = self._rows.indices(batch)
        else:
            first, end = self._rows or (0, batch)
        if not 0 <= first < end <= batch:
            raise ValueError(f"rows: expected rows of a batch of {batch}, got {self._rows}")
        if end - first != count:
            raise ValueError(
                f"units: expected units for the {end - first} batch rows {first} to {end - 1} that are recorded, got "
                f"{count}; under guidance, `rows` picks the conditional half"
            )
        return first, end


@contextlib.contextmanager
def record_attention(
    transformer: nn.Module,
    units: TextUnits | Tensor | None,
    *,
    layers: Iterable[int] | None = None,
    rows: slice | tuple[int, int] | None = None,
    direction: Literal["image_to_text", "text_to_image"] = "image_to_text",
    backend: str = "auto",
) -> Iterator[AttentionRecorder]:
    """Record the attention mass of every forward pass of `transformer` inside the ``with`` block.

    The joint attention of its blocks runs through `joint_attention`, which gives the same output and captures the mass
    on the way; all else, as the image-only attention of dual blocks, runs unchanged. One step is one forward pass::

        with record_attention(pipe.transformer, units, rows=slice(len(units), None)) as recorder:
            for t in timesteps:
                velocity = pipe.transformer(...)
                recorder.next_step()
        recorder.history  # per step [rows, image tokens, K]

    A second forward pass in the same step is an error. Blocks that gradient checkpointing runs again for the backward
    pass are not captured again, whether that happens in the step, after `next_step` or after the ``with`` block (there
    only with the model's own checkpointing, diffusers' ``enable_gradient_checkpointing``, called before the block).
    Leaving the block, also through an exception, puts the transformer's own attention processors back; the recorder
    stays readable.

    Args:
        transformer: a model of a class in `FAMILIES`, with or without adapters, or a PeftModel, DistributedDataParallel
            or torch.compile wrapper around one.
        units: the prompts' TextUnits, or unit weights [rows, N_text, K], for as many batch rows as are recorded and as
            many text tokens as ``encoder_hidden_states`` has. Moved to the transformer's device when it first runs.
            With None nothing is recorded, any number of forward passes is allowed, and the attention of `layers` is
            computed as it is when they are recorded: so that a policy update sees the very values of its rollout.
        layers: indices of the blocks to record, by default all.
        rows: the batch rows to record, a slice or (first, end), by default all. Diffusers' pipelines put the
            unconditional half first under guidance: ``rows=slice(batch // 2, None)``.
        direction: ``image_to_text`` or ``text_to_image``, see `joint_attention`.
        backend: ``auto``, ``triton``, ``cpu`` or ``reference``.

    Raises:
        TypeError: `transformer` is none of the above; `units`, `layers` or `rows` of the wrong type; a block has
            another attention processor than the one whose work the recorder does in its family.
        ValueError: layers or rows out of range, an unknown direction. The forward pass raises it where `units` do not
            fit its batch rows or text tokens.
        RuntimeError: `transformer` is being recorded already; a second forward pass in one step.
    """
    model, family = _unwrap(transformer)
    found = family.layers(model)
    recorder = AttentionRecorder(
        None if units is None else _unit_weights(units),
        _check_layers(layers, len(found)),
        _check_rows(rows),
        check_choice("direction", direction, DIRECTIONS),  # type: ignore[arg-type]
        backend,
    )
    if model in _being_recorded:
        raise RuntimeError("transformer: expected one that is not being recorded, got one inside record_attention")
    recorded = [_recorded(family, found[i], recorder, i) for i in recorder.layers]

    try:
        _being_recorded.add(model)
        for each in recorded:
            each.layer.attention.set_processor(each.capturing)
        with _keep_processors(model, family.checkpointing, recorded):
            yield recorder
    finally:
        for each in recorded:
            each.layer.attention.set_processor(each.own)
        _being_recorded.discard(model)


class _Attend:
    """`Attend` for one layer of one recording."""

    def __init__(self, recorder: AttentionRecorder, layer: int, name: str, recomputing: bool) -> None:
        self.recorder = recorder
        self.layer = layer
        self.name = name
        self.recomputing = recomputing

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, num_image_tokens: int, text_first: bool) -> Tensor:
        recomputing = self.recomputing or _runs_in_backward()
        return self.recorder._attend(
            self.layer, self.name, recomputing, query, key, value, num_image_tokens, text_first
        )


class _Recorded(NamedTuple):
    """A layer with its own processor and those that record it: when it runs, and when it runs again."""

    layer: Layer
    own: Any
    capturing: Any
    recomputing: Any


def _recorded(family: Family, layer: Layer, recorder: AttentionRecorder, index: int) -> _Recorded:
    capturing, recomputing = (
        family.processor(layer, _Attend(recorder, index, layer.name, recomputing)) for recomputing in (False, True)
    )
    return _Recorded(layer, layer.attention.processor, capturing, recomputing)


@contextlib.contextmanager
def _keep_processors(model: Any, checkpointing: str | None, recorded: list[_Recorded]) -> Iterator[None]:
    """Within this context checkpointing keeps a block's recording processor for when the block runs again.

    That may be when the recording is over and the block has its own processor back, which saves other tensors for
    autograd than the forward pass did. The processor of the second run is one that says so, because a compiled block
    cannot ask whether it runs in a backward pass.
    """
    checkpoint = None if checkpointing is None else getattr(model, checkpointing)
    if checkpointing is None or checkpoint is None:
        yield
        return
    by_block = {id(each.layer.block): each for each in recorded}

    def checkpoint_with_processor(block: Any, *args: Any) -> Any:
        each = by_block.get(id(block))
        if each is None:
            return checkpoint(block, *args)

        def run(*block_args: Any) -> Any:
            attention = each.layer.attention
            current = attention.processor
            attention.set_processor(each.recomputing if _runs_in_backward() else each.capturing)
            try:
                return block(*block_args)
            finally:
                attention.set_processor(current)

        return checkpoint(run, *args)

    setattr(model, checkpointing, checkpoint_with_processor)
    try:
        yield
    finally:
        if getattr(model, checkpointing) is checkpoint_with_processor:
            setattr(model, checkpointing, checkpoint)


def _runs_in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _unwrap(transformer: Any) -> tuple[Any, Family]:
    """The model of a known class inside wrappers that keep what they wrap in one of the usual attributes."""
    model = transformer
    while isinstance(model, nn.Module):
        # Also the bases: FSDP, and others, make a class of their own from the model's.
        for base in type(model).__mro__:
            if base.__name__ in FAMILIES:
                return model, FAMILIES[base.__name__]
        # torch.compile; DistributedDataParallel and FSDP; PeftModel; the tuner inside it.
        inner = (getattr(model, name, None) for name in ("_orig_mod", "module", "base_model", "model"))
        model = next((module for module in inner if isinstance(module, nn.Module)), None)
    raise TypeError(
        f"transformer: expected a model of class {', '.join(FAMILIES)}, or a PeftModel, DistributedDataParallel or "
        f"torch.compile wrapper around one, got {type(transformer).__name__}"
    )


def _unit_weights(units: TextUnits | Tensor) -> Tensor:
    if isinstance(units, TextUnits):
        return units.weights
    if not isinstance(units, Tensor):
        raise TypeError(f"units: expected TextUnits or a tensor [rows, N_text, K], got {type(units).__name__}")
    return check_tensor("units", units, ("rows", "N_text", "K"))


def _compact(unit_weights: Tensor) -> Tensor:
    """`unit_weights` in bfloat16 where that holds them exactly, as it does 0 and 1: GPU kernels read them faster so."""
    if unit_weights.device.type != "cpu" or unit_weights.dtype != torch.float32:
        return unit_weights
    compact = unit_weights.bfloat16()
    return compact if torch.equal(compact.float(), unit_weights) else unit_weights


def _check_layers(layers: Iterable[int] | None, num_layers: int) -> list[int]:
    if layers is None:
        return list(range(num_layers))
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise TypeError(f"layers: expected indices of transformer blocks, got {type(layers).__name__}")
    chosen = list(layers)
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers: expected ints, got {layer!r}")
        if not 0 <= layer < num_layers:
            raise ValueError(f"layers: expected indices from 0 to {num_layers - 1}, got {layer}")
    if not chosen:
        raise ValueError("layers: expected at least one index, got none")
    return sorted(set(chosen))


def _check_rows(rows: slice | tuple[int, int] | None) -> slice | tuple[int, int] | None:
    if rows is None:
        return None
    if isinstance(rows, slice):
        if rows.step not in (None, 1):
            raise ValueError(f"rows: expected rows next to each other, got {rows}")
        return rows
    if not isinstance(rows, (tuple, list)) or len(rows) != 2:
        raise TypeError(f"rows: expected a slice or (first, end), got {rows!r}")
    first, end = rows
    if any(isinstance(bound, bool) or not isinstance(bound, int) for bound in (first, end)):
        raise TypeError(f"rows: expected two ints, got {rows!r}")
    if not 0 <= first < end:
        raise ValueError(f"rows: expected 0 <= first < end, got {rows!r}")
    return first, end
