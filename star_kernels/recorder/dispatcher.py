"""Models whose attention goes through diffusers' dispatcher: the backend that the user has set computes it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from typing import Any

import torch
from torch import Tensor

from star_kernels.attention import sdpa
from star_kernels.attention.mass import autocast
from star_kernels.recorder.family import Attend, Layer, check_processor

# Backends that give the log-sum-exp they are asked for: by which option, and whether tokens stand before heads in it.
# docs/models.md has what the others do.
_LOG_SUM_EXP = {
    "flash": ("return_lse", False),
    "flash_hub": ("return_lse", False),
    "_flash_3": ("return_lse", True),
    "_flash_3_hub": ("return_attn_probs", False),
    "aiter": ("return_lse", False),
    "aiter_fa2_hub": ("return_lse", False),
}
# Those that are PyTorch's, whose kernels are called by their operators, and which one they allow.
_PYTORCH = {
    "native": None,
    "_native_flash": "FLASH_ATTENTION",
    "_native_efficient": "EFFICIENT_ATTENTION",
    "_native_cudnn": "CUDNN_ATTENTION",
}


def recording_processor(
    layer: Layer, expected: type, attend: Attend, *, text_first: bool, masks_text: bool = False
) -> Any:
    """What does the work of the layer's processor, which calls the dispatcher once, its attention by `attend`.

    It runs that processor's own code, in which the name ``dispatch_attention_fn`` means something else here: the model
    gives what it gives in this version of diffusers, bit for bit. The text are the tokens of ``encoder_hidden_states``;
    a layer that is called without them, as FLUX's single blocks, has as many as the units.

    With `masks_text` the code may hand a mask of keys to the dispatcher, and any other layer's is an error.

    Raises:
        TypeError: the processor is not of the class `expected`.
        ValueError: it shares its tokens with other processes.
    """
    own = check_processor(layer, expected)
    if own._parallel_config is not None:
        raise ValueError(f"{layer.name}: expected no context parallelism where attention is recorded, got it enabled")
    return _recording_class(expected)(own, attend, text_first, masks_text)


class _RecordingProcessor:
    def __init__(self, own: Any, attend: Attend, text_first: bool, masks_text: bool) -> None:
        self.own = own
        self.attend = attend
        self.text_first = text_first
        self.masks_text = masks_text

    # Where model.set_attention_backend looks and writes, within a recording too.
    @property
    def _attention_backend(self) -> Any:
        return self.own._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.own._attention_backend = backend


@functools.cache
def _recording_class(kind: type) -> type:
    code: Any = kind.__call__
    dispatch = code.__globals__["dispatch_attention_fn"]
    names = {**code.__globals__, "dispatch_attention_fn": _attend_instead}
    del names["__name__"]  # with it torch.compile would guard the names of diffusers' module
    replay = types.FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)

    takes_text = "encoder_hidden_states" in inspect.signature(code).parameters

    # diffusers reads the names of the parameters, and passes only what they name.
    @functools.wraps(code)
    def call(self: _RecordingProcessor, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        text = kwargs.get("encoder_hidden_states", args[0] if args else None) if takes_text else None
        itself = _Call(self, dispatch, None if text is None else text.shape[1])
        return replay(itself, attn, hidden_states, *args, **kwargs)

    return type(f"Recording{kind.__name__}", (_RecordingProcessor,), {"__call__": call})


def _attend_instead(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    backend: _Call,
    parallel_config: None,
) -> Tensor:
    """What the code calls for ``dispatch_attention_fn``, [B, N, heads, D] to the same."""
    if attn_mask is not None and not backend.processor.masks_text:
        raise ValueError(f"attention_mask: expected None in a layer that is recorded, got {type(attn_mask).__name__}")
    if dropout_p or is_causal:
        raise ValueError(
            f"dropout_p: expected 0 and is_causal False in a layer that is recorded, got {dropout_p} and {is_causal}"
        )
    return backend.attend(query, key, value, attn_mask=attn_mask)


def _key_mask(attn_mask: Tensor, batch: int, num_keys: int) -> Tensor:
    """[B, N] bool of a mask that says for each row which keys take part.

    Raises:
        ValueError: a mask of pairs, of heads, or of numbers that are added to the logits.
    """
    shapes = (batch, num_keys), (batch, 1, 1, num_keys)
    if attn_mask.dtype != torch.bool or tuple(attn_mask.shape) not in shapes:
        raise ValueError(
            f"attention_mask: expected a bool mask of keys {shapes[0]} in a layer that is recorded, got "
            f"{attn_mask.dtype} {tuple(attn_mask.shape)}"
        )
    return attn_mask.view(batch, num_keys)


class _Call:
    """One call of a recording processor: what the code finds as its self and as its backend, and `OwnAttention`."""

    _parallel_config = None

    def __init__(self, processor: _RecordingProcessor, dispatch: Any, num_text_tokens: int | None) -> None:
        self.processor = processor
        self.dispatch = dispatch
        self.num_text_tokens = num_text_tokens
        self.tensors: tuple[Tensor, ...] = ()
        self.attn_mask: Tensor | None = None
        self.key_mask: Tensor | None = None

    @property
    def _attention_backend(self) -> _Call:
        return self

    def attend(self, *tensors: Tensor, attn_mask: Tensor | None) -> Tensor:
        self.tensors, self.attn_mask = tensors, attn_mask
        batch, num_tokens = tensors[0].shape[:2]
        self.key_mask = None if attn_mask is None else _key_mask(attn_mask, batch, num_tokens)
        out = self.processor.attend(
            *(tensor.transpose(1, 2) for tensor in tensors),
            num_image_tokens=None if self.num_text_tokens is None else num_tokens - self.num_text_tokens,
            text_first=self.processor.text_first,
            key_mask=self.key_mask,
            own=self,
        )
        return out.transpose(1, 2)

    @property
    def backend(self) -> str:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend = self.processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        return str(getattr(backend, "value", backend))

    @property
    def name(self) -> str:
        return f"diffusers:{self.backend}"

    def __call__(self, wants_log_sum_exp: bool) -> tuple[Tensor, Tensor | None]:
        backend = self.backend
        if wants_log_sum_exp and backend in _PYTORCH:
            query, key, value = (autocast(tensor.transpose(1, 2)) for tensor in self.tensors)
            if backend == "_native_cudnn":  # as diffusers hands them to it
                query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
            with _allowing(_PYTORCH[backend]):
                kernel = sdpa.kernel_for(query, query.shape[2], masked=self.key_mask is not None)
            if kernel is not None:
                return sdpa.attention(kernel, query, key, value, query.shape[3] ** -0.5, self.key_mask)
        option, tokens_first = _LOG_SUM_EXP.get(backend, (None, False)) if wants_log_sum_exp else (None, False)
        result = self.dispatch(
            *self.tensors,
            attn_mask=self.attn_mask,
            backend=self.processor._attention_backend,
            attention_kwargs=None if option is None else {option: True},
        )
        if option is None:
            return result.transpose(1, 2), None
        out, log_sum_exp = result
        return out.transpose(1, 2), (log_sum_exp.transpose(1, 2) if tokens_first else log_sum_exp).detach()


def _allowing(kernel: str | None) -> contextlib.AbstractContextManager[None]:
    if kernel is None:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel  # slow to import

    return sdpa_kernel(getattr(SDPBackend, kernel))
