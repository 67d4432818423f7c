"""Recording attention mass while a diffusers transformer runs (docs/method.md, section 3)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from star_kernels._checks import check_choice, check_tensor
from star_kernels.attention import DIRECTIONS, joint_attention
from star_kernels.text_units import TextUnits


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
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, num_image_tokens: int, recomputing: bool
    ) -> Tensor:
        """Attention of one joint block, [B, heads, N, D] to the same; its mass joins the current step's.

        A block that gradient checkpointing runs again computes the same things, so that autograd finds the tensors it
        expects, but its mass is dropped: it belongs to a step that is over or has this layer already.
        """
        if self._unit_weights is None:
            out, _ = joint_attention(query, key, value, num_image_tokens=num_image_tokens, backend=self._backend)
            return out
        if layer in self._captured and not recomputing:
            raise RuntimeError(
                f"{_name(layer)}: expected one forward pass per step, got a second one; call next_step() on the "
                "recorder after each forward pass, or discard_step() where the last one is not wanted"
            )
        out, mass = joint_attention(
            query,
            key,
            value,
            self._unit_weights_for(self._unit_weights, query, num_image_tokens),
            num_image_tokens=num_image_tokens,
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
    only with checkpointing by ``enable_gradient_checkpointing``, called before the block). Leaving the block, also
    through an exception, puts the transformer's own attention processors back; the recorder stays readable.

    Args:
        transformer: diffusers' SD3Transformer2DModel, with or without adapters, or a PeftModel, DistributedDataParallel
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
            another attention processor than diffusers' JointAttnProcessor2_0, whose work the recorder does.
        ValueError: layers or rows out of range, an unknown direction. The forward pass raises it where `units` do not
            fit its batch rows or text tokens.
        RuntimeError: `transformer` is being recorded already; a second forward pass in one step.
    """
    model = _unwrap(transformer)
    blocks: list[Any] = list(model.transformer_blocks)
    recorder = AttentionRecorder(
        None if units is None else _unit_weights(units),
        _check_layers(layers, len(blocks)),
        _check_rows(rows),
        check_choice("direction", direction, DIRECTIONS),  # type: ignore[arg-type]
        backend,
    )
    originals = {layer: block.attn.processor for layer, block in enumerate(blocks)}
    if any(isinstance(processor, _CapturingProcessor) for processor in originals.values()):
        raise RuntimeError("transformer: expected one that is not being recorded, got one inside record_attention")
    for layer in recorder.layers:
        _check_processor(layer, originals[layer])

    capturing = {layer: _CapturingProcessor(recorder, layer) for layer in recorder.layers}
    checkpoint = model._gradient_checkpointing_func
    wrapped = checkpoint and _keep_processors(checkpoint, {id(blocks[i]): new for i, new in capturing.items()})
    try:
        for layer, processor in capturing.items():
            blocks[layer].attn.set_processor(processor)
        model._gradient_checkpointing_func = wrapped
        yield recorder
    finally:
        for layer in capturing:
            blocks[layer].attn.set_processor(originals[layer])
        if model._gradient_checkpointing_func is wrapped:
            model._gradient_checkpointing_func = checkpoint


class _CapturingProcessor:
    """diffusers' JointAttnProcessor2_0 (SD3 joint attention, image tokens first) through `joint_attention`."""

    def __init__(self, recorder: AttentionRecorder, layer: int, recomputing: bool = False) -> None:
        self.recorder = recorder
        self.layer = layer
        self.recomputing = recomputing

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        num_image_tokens = hidden_states.shape[1]
        image = [_heads(project(hidden_states), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v)]
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = [_heads(project(encoder_hidden_states), attn.heads) for project in projections]
        for tensors, norms in ((image, (attn.norm_q, attn.norm_k)), (text, (attn.norm_added_q, attn.norm_added_k))):
            for i, norm in enumerate(norms):
                if norm is not None:
                    tensors[i] = norm(tensors[i])
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))

        recomputing = self.recomputing or _runs_in_backward()
        out = self.recorder._attend(self.layer, query, key, value, num_image_tokens, recomputing)
        out = out.transpose(1, 2).flatten(2)
        image_out, text_out = out[:, :num_image_tokens], out[:, num_image_tokens:]
        for module in attn.to_out:
            image_out = module(image_out)
        return image_out, text_out if attn.context_pre_only else attn.to_add_out(text_out)


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """[B, N, heads * D] to [B, heads, N, D]."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def _keep_processors(checkpoint: Callable[..., Any], processors: dict[int, _CapturingProcessor]) -> Callable[..., Any]:
    """`checkpoint(block, *args)` such that the block runs with its recording processor also when it runs again.

    Its backward pass may come when the recording is over and the block has its own processor back, which saves other
    tensors for autograd than the forward pass did. The processor of the second run is one that says so, because a
    compiled block cannot ask whether it runs in a backward pass.
    """

    def checkpoint_with_processor(block: Any, *args: Any) -> Any:
        processor = processors.get(id(block))
        if processor is None:
            return checkpoint(block, *args)

        def run(*block_args: Any) -> Any:
            current = block.attn.processor
            again = _CapturingProcessor(processor.recorder, processor.layer, recomputing=True)
            block.attn.set_processor(again if _runs_in_backward() else processor)
            try:
                return block(*block_args)
            finally:
                block.attn.set_processor(current)

        return checkpoint(run, *args)

    return checkpoint_with_processor


def _runs_in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _unwrap(transformer: Any) -> Any:
    """The SD3Transformer2DModel inside wrappers that keep what they wrap in one of the usual attributes."""
    from diffusers import SD3Transformer2DModel

    model = transformer
    while isinstance(model, nn.Module) and not isinstance(model, SD3Transformer2DModel):
        # torch.compile; DistributedDataParallel and FSDP; PeftModel; the tuner inside it.
        inner = (getattr(model, name, None) for name in ("_orig_mod", "module", "base_model", "model"))
        model = next((module for module in inner if isinstance(module, nn.Module)), None)
    if not isinstance(model, SD3Transformer2DModel):
        raise TypeError(
            "transformer: expected diffusers' SD3Transformer2DModel, or a PeftModel, DistributedDataParallel or "
            f"torch.compile wrapper around one, got {type(transformer).__name__}"
        )
    return model


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


def _check_processor(layer: int, processor: Any) -> None:
    from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0

    # Exactly this class: a subclass may compute something else.
    if type(processor) is JointAttnProcessor2_0:
        return
    hint = "; call unfuse_qkv_projections() first" if isinstance(processor, FusedJointAttnProcessor2_0) else ""
    raise TypeError(
        f"{_name(layer)}: expected the attention processor JointAttnProcessor2_0, which recording replaces, got "
        f"{type(processor).__name__}{hint}"
    )


def _name(layer: int) -> str:
    return f"transformer_blocks.{layer}.attn"
