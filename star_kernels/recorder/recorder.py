"""Recording attention mass while a model of a known family runs (docs/method.md, section 3)."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from star_kernels import backends
from star_kernels._checks import check_choice, check_tensor
from star_kernels.attention import (
    DIRECTIONS,
    IMPLEMENTATIONS,
    attention_implementation,
    joint_attention,
    mass_beside,
)
from star_kernels.attention.reference import num_text_keys
from star_kernels.recorder import flux, flux2, qwen_image, sd3, unet, z_image
from star_kernels.recorder.family import Family, FollowsPasses, Layer, Layout, OwnAttention
from star_kernels.text_units import TextUnits

# The family of a model, by the name of the model's class or of one that it derives from.
FAMILIES: dict[str, Family] = {
    sd3.MODEL: sd3,
    flux.MODEL: flux,
    flux2.MODEL: flux2,
    qwen_image.MODEL: qwen_image,
    z_image.MODEL: z_image,
    unet.MODEL: unet,
}

_SAME_ENCODING = "make them with the tokenizers and lengths that encode the prompts"
_being_recorded: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Capture:
    """What one layer has given in the current step.

    Blocks that torch.compile compiles one by one share a graph as long as nothing that their code reads differs between
    them. So a layer has no number here, its name is read in an error alone, and its mass is not added to a sum, which
    would be there for all layers but the first.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.mass: Tensor | None = None
        # Rows and columns of its image tokens, where layers attend at several resolutions.
        self.grid: tuple[int, int] | None = None
        # Of the last call: the name of the model's own attention, or what chooses an implementation of the library's.
        self.ran: str | tuple[torch.device, torch.dtype, int, int] | None = None


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
        implementation: Literal["auto", "fused", "sdpa"],
        backend: str,
        record_pass: int | None,
        captures: list[_Capture],
    ) -> None:
        self.layers = layers
        self.history: list[Tensor] = []
        self._unit_weights = unit_weights
        self._to_send = None if unit_weights is None else _compact(unit_weights)
        self._rows = rows
        self._direction = direction
        self._implementation = implementation
        self._backend = backend
        self._captures = captures
        self._record_pass = record_pass
        self._passes = 0
        self._in_recorded_pass = False
        # Of a family that follows passes: this one's image tokens, and the unit weights at their places behind them.
        self._num_image_tokens: int | None = None
        self._placed: Tensor | None = None

    @property
    def implementation(self) -> str | None:
        """What computed the attention of the recorded layers when they last ran, None before.

        ``fused`` for the library's kernel, ``sdpa:`` and its name for one of PyTorch's, ``diffusers:`` and its name for
        the backend that is set in diffusers; all that there were, where the layers differ.
        """
        names = dict.fromkeys(self._name_of(capture.ran) for capture in self._captures if capture.ran is not None)
        return ", ".join(names) or None

    def _name_of(self, ran: str | tuple[torch.device, torch.dtype, int, int]) -> str:
        if isinstance(ran, str):
            return ran
        device, dtype, head_dim, num_keys = ran
        tokens = torch.empty((), device=device, dtype=dtype).expand(1, 1, num_keys, head_dim)
        return attention_implementation(tokens, tokens, implementation=self._implementation, backend=self._backend)

    @property
    def mass(self) -> Tensor:
        """The current step's mass [rows, image tokens, K] float32, the mean over the recorded layers that ran.

        Image tokens stand in the order of the transformer's patches, row by row. Where layers attend at several
        resolutions each is brought to `grid`, the finest of them: a token has the mass of the coarser one that it lies
        in. The tensor carries no gradient.

        Raises:
            RuntimeError: the transformer has not run in this step, or not up to the pass that is recorded, or there
                are no units to record.
        """
        first, *others = self._masses("mass")
        return sum(others, first) / (1 + len(others))

    @property
    def mass_by_layer(self) -> Tensor:
        """What `mass` is the mean of: that of each recorded layer that ran, [layers, rows, image tokens, K] float32.

        Raises:
            RuntimeError: as for `mass`.
        """
        return torch.stack(self._masses("mass_by_layer"))

    def _masses(self, name: str) -> list[Tensor]:
        if self._unit_weights is None:
            raise RuntimeError(f"{name}: expected units to record, got units=None, which only runs the same attention")
        masses = [(capture.mass, capture.grid) for capture in self._captures if capture.mass is not None]
        if not masses and self._record_pass is not None:
            raise RuntimeError(
                f"{name}: expected recorded layers to run in forward pass {self._record_pass} of this step "
                f"(record_pass={self._record_pass}, counted from 0), got {self._passes} passes so far"
            )
        if not masses:
            raise RuntimeError(
                f"{name}: expected a forward pass of the recorded transformer in this step, got none yet"
            )
        return [_on_grid(mass, grid, self.grid) for mass, grid in masses]

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the image tokens of `mass`, where layers attend at several resolutions; else None."""
        grids = [capture.grid for capture in self._captures if capture.mass is not None and capture.grid is not None]
        return max(grids, key=math.prod, default=None)

    def next_step(self) -> None:
        """Append the current step's mass to `history` and begin the next step.

        Raises:
            RuntimeError: as for `mass`.
        """
        self.history.append(self.mass)
        self.discard_step()

    def discard_step(self) -> None:
        """Forget what the current step has captured, as after a forward pass that failed or is not wanted."""
        self._passes = 0
        for capture in self._captures:
            capture.mass = None

    def _begin_pass(self, *_: Any) -> None:
        # A checkpoint around the whole model runs it again, which is no pass of the step.
        if not _runs_in_backward():
            # Compiled blocks read this bool and not the count, which would give each pass graphs of its own.
            self._in_recorded_pass = self._passes == self._record_pass
            self._passes += 1

    def _check_text(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Before a `Layer.text` runs."""
        if self._record_pass is None or self._in_recorded_pass:
            self._check_num_text_tokens(args[0].shape[1])

    def _begin_layout(self, layout: Layout) -> None:
        self._num_image_tokens, self._placed = layout.num_image_tokens, None
        if self._unit_weights is None or (self._record_pass is not None and not self._in_recorded_pass):
            return
        first, end = self._row_range(len(layout.captions), len(self._unit_weights))
        longest, found = max(layout.captions[first:end]), self._unit_weights.shape[1]
        if found < longest:
            raise ValueError(
                f"units: expected weights for the {longest} text tokens of this forward pass's longest recorded row, "
                f"got {found}; {_SAME_ENCODING}"
            )
        kept = self._unit_weights[:, : layout.num_tokens - layout.text_begin]
        before = layout.text_begin - layout.num_image_tokens
        behind = layout.num_tokens - layout.text_begin - kept.shape[1]
        self._placed = pad(kept, (0, 0, before, behind))

    def _attend(
        self,
        attend: _Attend,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_image_tokens: int | None,
        text_first: bool,
        text_lengths: Tensor | None,
        key_mask: Tensor | None,
        own: OwnAttention | None,
    ) -> Tensor:
        """Attention of one joint block, [B, heads, N, D] to the same; its mass becomes the layer's in this step.

        A pass that is not the chosen one is not captured, nor a block that gradient checkpointing runs again: it
        belongs to a step that is over or has this layer already. What autograd saves does not depend on that.
        """
        capture, unit_weights, rows = attend.capture, None, None
        if num_image_tokens is None:
            num_image_tokens = self._num_image_tokens
        if self._records(attend):
            unit_weights = self._unit_weights_for(query, key, num_image_tokens)
            rows = self._row_range(query.shape[0], len(unit_weights))
        options: dict[str, Any] = {"text_first": text_first, "direction": self._direction, "backend": self._backend}
        if own is None:
            out, mass = joint_attention(
                query,
                key,
                value,
                unit_weights,
                num_image_tokens=num_image_tokens,  # type: ignore[arg-type]
                text_lengths=text_lengths,
                rows=rows,
                implementation=self._implementation,
                **options,
            )
            capture.ran = (out.device, out.dtype, out.shape[3], key.shape[2])
        else:
            if self._implementation != "auto":
                raise ValueError(
                    f"implementation: expected auto, got {self._implementation}: {capture.name} runs what is set in "
                    f"diffusers ({own.name}); model.set_attention_backend sets another backend"
                )
            out, log_sum_exp = own(rows is not None)
            if unit_weights is not None and rows is not None:
                options["num_image_tokens"] = num_image = num_image_tokens or query.shape[2] - unit_weights.shape[1]
                if key_mask is not None:
                    text_lengths = _text_lengths(key_mask, num_image, text_first)
                mass = _mass(query, key, value, unit_weights, log_sum_exp, slice(*rows), text_lengths, **options)
            capture.ran = own.name
        if unit_weights is not None:
            capture.mass = mass
        return out

    def _records(self, attend: _Attend) -> bool:
        if self._unit_weights is None or attend.recomputing or _runs_in_backward():
            return False
        if self._record_pass is not None and not self._in_recorded_pass:
            return False
        if attend.capture.mass is not None:
            raise RuntimeError(
                f"{attend.capture.name}: expected one forward pass per step, got a second one; call next_step() on the "
                "recorder after each forward pass, or discard_step() where the last one is not wanted; where a step "
                "has several, as in a pipeline's call with skip-layer guidance, record_attention(..., record_pass=0) "
                "records the first of each step"
            )
        return True

    def _unit_weights_for(self, query: Tensor, key: Tensor, num_image_tokens: int | None) -> Tensor:
        if self._placed is not None:
            return self._placed.to(query.device)
        unit_weights = self._unit_weights
        assert unit_weights is not None, "recorded"
        num_text_tokens = unit_weights.shape[1]
        if num_image_tokens is None and num_text_tokens >= query.shape[2]:
            raise ValueError(
                f"units: expected weights for fewer than the {query.shape[2]} text and image tokens of this forward "
                f"pass, got {num_text_tokens}"
            )
        if num_image_tokens is not None:
            self._check_num_text_tokens(num_text_keys(query.shape[2], key.shape[2], num_image_tokens))
        return self._move(unit_weights, query.device)

    def _check_num_text_tokens(self, expected: int) -> None:
        assert self._unit_weights is not None, "recorded"
        if self._unit_weights.shape[1] != expected:
            raise ValueError(
                f"units: expected weights for the {expected} text tokens of this forward pass, got "
                f"{self._unit_weights.shape[1]}; {_SAME_ENCODING}"
            )

    def _move(self, unit_weights: Tensor, device: torch.device) -> Tensor:
        if unit_weights.device != device:
            assert self._to_send is not None, "made together with the unit weights"
            unit_weights = self._unit_weights = self._to_send.to(device)
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
    layers: Iterable[int | str] | None = None,
    rows: slice | tuple[int, int] | None = None,
    direction: Literal["image_to_text", "text_to_image"] = "image_to_text",
    implementation: Literal["auto", "fused", "sdpa"] = "auto",
    backend: str = "auto",
    record_pass: int | None = None,
) -> Iterator[AttentionRecorder]:
    """Record the attention mass of every forward pass of `transformer` inside the ``with`` block.

    The joint attention of its blocks runs through `joint_attention`, which captures the mass on the way, or stays with
    the backend that is set in diffusers, and `attention_mass` runs beside it (docs/models.md says where). All else, as
    the image-only attention of dual blocks, runs unchanged. One step is one forward pass::

        with record_attention(pipe.transformer, units, rows=slice(len(units), None)) as recorder:
            for t in timesteps:
                velocity = pipe.transformer(...)
                recorder.next_step()
        recorder.history  # per step [rows, image tokens, K]

    A second forward pass in the same step is an error, unless `record_pass` says which one is recorded. That is for
    pipelines whose step runs the transformer several times, as StableDiffusion3Pipeline with ``skip_guidance_layers``::

        def end_of_step(pipe, step, timestep, tensors):
            recorder.next_step()
            return {}

        with record_attention(pipe.transformer, units, rows=slice(len(units), None), record_pass=0) as recorder:
            pipe(prompts, skip_guidance_layers=[7, 8, 9], callback_on_step_end=end_of_step)

    Blocks that gradient checkpointing runs again for the backward
    pass are not captured again, whether that happens in the step, after `next_step` or after the ``with`` block (there
    only with the model's own checkpointing, diffusers' ``enable_gradient_checkpointing``, called before the block).
    Leaving the block, also through an exception, puts the transformer's own attention processors back; the recorder
    stays readable.

    Args:
        transformer: a model of a class in `FAMILIES`, with or without adapters, or a PeftModel, DistributedDataParallel
            or torch.compile wrapper around one.
        units: the prompts' TextUnits, or unit weights [rows, N_text, K], for as many batch rows as are recorded and as
            many text tokens as ``encoder_hidden_states`` has; for Z-Image for at least as many as the longest recorded
            prompt has. Moved to the transformer's device.
            With None nothing is recorded, any number of forward passes is allowed, and the attention of `layers` is
            computed as it is when they are recorded: so that a policy update sees the very values of its rollout.
        layers: indices of the blocks to record, or their names, by default all; FLUX's single blocks count on after the
            dual ones, and a U-Net's cross-attention counts down, through the middle and up. A name is that of a layer,
            as in messages, or of a module that has layers in it: ``mid_block``, ``up_blocks.1``.
        rows: the batch rows to record, a slice or (first, end), by default all. Under guidance
            Stable Diffusion's pipelines put the unconditional half of a batch first, ``rows=slice(batch // 2, None)``;
            ZImagePipeline puts the prompts first, ``rows=slice(batch // 2)``.
        direction: ``image_to_text`` or ``text_to_image``, see `joint_attention`.
        implementation: ``auto``, ``fused`` or ``sdpa``, see `joint_attention`; with ``sdpa`` the model gives what it
            gives without recording, bit for bit. ``auto`` alone where the backend that is set in diffusers computes
            the attention. `AttentionRecorder.implementation` says what came of it.
        backend: of the library's kernels, ``auto``, ``triton``, ``cpu`` or ``reference``.
        record_pass: which of a step's forward passes is recorded, counted from 0; the others run the same attention
            without capture, and `units` and `rows` need not fit them. By default a step has one. With guidance in one
            batch pass 0 has the conditional half and skip-layer guidance is pass 1; a pipeline that calls its model
            once with and once without the prompt says by its order which is which.

    Raises:
        TypeError: `transformer` is none of the above; `units`, `layers`, `rows` or `record_pass` of the wrong type; a
            block has another attention processor than the one whose work the recorder does in its family.
        ValueError: layers, rows or record_pass out of range, an unknown direction, implementation or backend, a model
            under context parallelism. The forward pass raises it where `units` do not fit its batch rows or text
            tokens, or `implementation` not the model.
        RuntimeError: `transformer` is being recorded already; a second forward pass in one step.
    """
    model, family = _unwrap(transformer)
    found = family.layers(model)
    chosen = _check_layers(layers, [layer.name for layer in found])
    captures = [_Capture(found[i].name) for i in chosen]
    recorder = AttentionRecorder(
        None if units is None else _unit_weights(units),
        chosen,
        _check_rows(rows),
        check_choice("direction", direction, DIRECTIONS),  # type: ignore[arg-type]
        check_choice("implementation", implementation, IMPLEMENTATIONS),  # type: ignore[arg-type]
        check_choice("backend", backend, ("auto", *backends.NAMES)),
        _check_record_pass(record_pass),
        captures,
    )
    # Here and not when the model first runs: the compiled block that does it would need a graph of its own.
    if recorder._unit_weights is not None:
        recorder._move(recorder._unit_weights, next(model.parameters()).device)
    if model in _being_recorded:
        raise RuntimeError("transformer: expected one that is not being recorded, got one inside record_attention")
    recorded = [_recorded(family, found[i], recorder, capture) for i, capture in zip(chosen, captures, strict=True)]

    try:
        _being_recorded.add(model)
        for each in recorded:
            each.layer.attention.set_processor(each.capturing)
        with (
            contextlib.ExitStack() as callers,
            _count_passes(model, recorder),
            _watch_text(recorded, recorder),
            _follow_passes(model, family, recorder),
        ):
            for caller, called in _by_caller(recorded):
                callers.enter_context(
                    _keep_processors(model if caller is None else caller, family.checkpointing, called)
                )
                if caller is not None and units is not None:
                    callers.enter_context(_note_grid(caller, called))
            yield recorder
    finally:
        for each in recorded:
            each.layer.attention.set_processor(each.own)
        _being_recorded.discard(model)


class _Attend:
    """`Attend` for one layer of one recording."""

    def __init__(self, recorder: AttentionRecorder, capture: _Capture, recomputing: bool) -> None:
        self.recorder = recorder
        self.capture = capture
        self.recomputing = recomputing

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        num_image_tokens: int | None,
        text_first: bool,
        text_lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        own: OwnAttention | None = None,
    ) -> Tensor:
        tensors = query, key, value
        return self.recorder._attend(self, *tensors, num_image_tokens, text_first, text_lengths, key_mask, own)


def _mass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor,
    log_sum_exp: Tensor | None,
    rows: slice,
    text_lengths: Tensor | None,
    **options: Any,
) -> Tensor | None:
    """The mass of an attention that something else computes, by a pass of our own where its log-sum-exp is missing."""
    if log_sum_exp is not None:
        return mass_beside(query, key, unit_weights, log_sum_exp, rows=rows, text_lengths=text_lengths, **options)
    query, key, value = query.detach()[rows], key.detach()[rows], value.detach()[rows]
    text_lengths = None if text_lengths is None else text_lengths[rows]
    return joint_attention(query, key, value, unit_weights, text_lengths=text_lengths, **options)[1]


def _text_lengths(key_mask: Tensor, num_image_tokens: int, text_first: bool) -> Tensor:
    """How many of a row's text keys take part, [B], of those that do in all [B, N]; looked at on the CPU only."""
    lengths = key_mask.sum(1) - num_image_tokens
    if key_mask.device.type == "cpu" and not torch.compiler.is_compiling():
        text = key_mask[:, :-num_image_tokens] if text_first else key_mask[:, num_image_tokens:]
        if not torch.equal(text, torch.arange(text.shape[1]) < lengths[:, None]):
            raise ValueError(
                "attention_mask: expected all image tokens and the first text tokens of a row to take part in a layer "
                "that is recorded, got a mask with gaps"
            )
    return lengths


class _Recorded(NamedTuple):
    """A layer with its own processor and those that record it: when it runs, and when it runs again."""

    layer: Layer
    capture: _Capture
    own: Any
    capturing: Any
    recomputing: Any


def _recorded(family: Family, layer: Layer, recorder: AttentionRecorder, capture: _Capture) -> _Recorded:
    capturing, recomputing = (
        family.processor(layer, _Attend(recorder, capture, recomputing)) for recomputing in (False, True)
    )
    return _Recorded(layer, capture, layer.attention.processor, capturing, recomputing)


def _by_caller(recorded: list[_Recorded]) -> list[tuple[nn.Module | None, list[_Recorded]]]:
    """The modules that call recorded blocks, None for the model, each with the layers of these."""
    groups: dict[int, tuple[nn.Module | None, list[_Recorded]]] = {}
    for each in recorded:
        groups.setdefault(id(each.layer.caller), (each.layer.caller, []))[1].append(each)
    return list(groups.values())


@contextlib.contextmanager
def _note_grid(caller: nn.Module, recorded: list[_Recorded]) -> Iterator[None]:
    """Within this context the captures of a caller's layers know their rows and columns of image tokens."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features: Tensor = args[0] if args else kwargs["hidden_states"]
        for each in recorded:
            each.capture.grid = features.shape[2], features.shape[3]

    hook = caller.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _on_grid(mass: Tensor, grid: tuple[int, int] | None, finest: tuple[int, int] | None) -> Tensor:
    """A layer's mass [rows, h·w, K] on a grid that is at least as fine as its own."""
    if grid is None or finest is None or grid == finest:
        return mass
    return interpolate(mass.mT.unflatten(2, grid), finest, mode="nearest").flatten(2).mT


@contextlib.contextmanager
def _keep_processors(model: Any, checkpointing: str | None, recorded: list[_Recorded]) -> Iterator[None]:
    """Within this context checkpointing by `model`, the blocks' caller, keeps a block's recording processor for when
    the block runs again.

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


@contextlib.contextmanager
def _count_passes(model: nn.Module, recorder: AttentionRecorder) -> Iterator[None]:
    """Within this context the recorder knows which forward pass of its step runs, where it has to choose one.

    The model tells and not its layers, because a pass may skip any of them.
    """
    if recorder._record_pass is None:
        yield
        return
    hook = model.register_forward_pre_hook(recorder._begin_pass)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _watch_text(recorded: list[_Recorded], recorder: AttentionRecorder) -> Iterator[None]:
    """Within this context units must be as long as the text that the model is given, where no layer can say so."""
    modules = {id(each.layer.text): each.layer.text for each in recorded}
    watched = [] if recorder._unit_weights is None else [module for module in modules.values() if module is not None]
    hooks = [module.register_forward_pre_hook(recorder._check_text) for module in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _follow_passes(model: nn.Module, family: Family, recorder: AttentionRecorder) -> Iterator[None]:
    """Within this context the recorder knows where text stands in each pass, of families whose layers cannot tell."""
    if not isinstance(family, FollowsPasses):
        yield
        return

    def begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder._begin_layout(family.layout(model, *args, **kwargs))

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


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


def _check_layers(layers: Iterable[int | str] | None, names: list[str]) -> list[int]:
    if layers is None:
        return list(range(len(names)))
    if not isinstance(layers, Iterable) or isinstance(layers, str):
        raise TypeError(f"layers: expected indices of transformer blocks, got {type(layers).__name__}")
    chosen: list[int] = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, (int, str)):
            raise TypeError(f"layers: expected ints or names, got {layer!r}")
        if isinstance(layer, str):
            inside = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{layer}.")]
            if not inside:
                raise ValueError(
                    f"layers: expected names of layers or of modules with some, as {names[0]}, got {layer!r}"
                )
            chosen += inside
        elif 0 <= layer < len(names):
            chosen.append(layer)
        else:
            raise ValueError(f"layers: expected indices from 0 to {len(names) - 1}, got {layer}")
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


def _check_record_pass(record_pass: int | None) -> int | None:
    if record_pass is None:
        return None
    if isinstance(record_pass, bool) or not isinstance(record_pass, int):
        raise TypeError(f"record_pass: expected the index of a step's forward pass or None, got {record_pass!r}")
    if record_pass < 0:
        raise ValueError(f"record_pass: expected an index >= 0, got {record_pass}")
    return record_pass
