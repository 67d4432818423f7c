"""What the recorder asks about a family of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn


class Layer(NamedTuple):
    """One attention that can be recorded.

    Attributes:
        name: what messages call it.
        attention: the module that attends. Its ``processor`` does the work, called with the module first, and
            ``set_processor`` puts another in its place, as in diffusers.
        block: the module that gradient checkpointing runs again as a whole, which has no other layer in it.
        text: where the attention cannot tell text from image, a module that the model calls in each pass with the text
            tokens [B, N_text, D] alone, so that units of another length do not cut the sequence at the wrong place.
        caller: where layers attend at several resolutions, the module that calls `block`, with its image's features
            [B, C, h, w] as first argument, and that has the function for checkpointing. By default both is the model,
            and all layers have one grid.
    """

    name: str
    attention: Any
    block: nn.Module
    text: nn.Module | None = None
    caller: nn.Module | None = None


class Layout(NamedTuple):
    """Where text stands in one forward pass of a model whose layers cannot tell it from the image, which is first.

    Attributes:
        num_image_tokens: the first tokens of each row.
        text_begin: where the text of each row begins; what is between takes part and is no unit's.
        num_tokens: of the longest row.
        captions: the number of text tokens that each row was given.
    """

    num_image_tokens: int
    text_begin: int
    num_tokens: int
    captions: list[int]


class OwnAttention(Protocol):
    """The attention of a layer as the model itself computes it."""

    @property
    def name(self) -> str:
        """What `AttentionRecorder.implementation` calls it."""

    def __call__(self, wants_log_sum_exp: bool) -> tuple[Tensor, Tensor | None]:
        """The output [B, heads, N, D], and the natural log-sum-exp [B, heads, N] float32, without gradient, of any
        strides: None where it is not wanted, or not to be had."""


class Attend(Protocol):
    """Softmax attention of one layer, recorded on the way."""

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
        """The attention's output [B, heads, N, D] for query, key and value of that shape, see `joint_attention`.

        `num_image_tokens` of the N tokens are the image's, in one piece; the text stands before them with `text_first`
        and else behind. With all N of them key and value are the text's alone, of any length. A layer that cannot tell
        text from image says None: then `FollowsPasses` has told, or as many tokens are text as the units have. With
        `own`, that computes the output, and the mass comes from beside it; the keys that take part in it are those of
        `key_mask` [B, N] bool, where there is one: all of the image, and of a row's text the first ones.
        """


class Family(Protocol):
    """What the recorder must know of a family of models: an object with these members, or a module."""

    @property
    def checkpointing(self) -> str | None:
        """The attribute of the model, or of a layer's caller, with the function that this calls as
        ``f(layer.block, *args)`` to checkpoint a block.

        The attribute may be None, as in diffusers while checkpointing is off. Without such an attribute (the name is
        None) a block that runs again is recognised while the recording lasts, and no longer.
        """

    def layers(self, model: Any) -> list[Layer]:
        """Every layer of `model` that can be recorded, in the order in which they run."""

    def processor(self, layer: Layer, attend: Attend) -> Callable[..., Any]:
        """What takes the place of the layer's own processor: it computes the same, its attention by `attend`.

        Raises:
            TypeError: the layer's own processor, which the message names, is not the one whose work this does.
        """


@runtime_checkable
class FollowsPasses(Protocol):
    """A `Family` that tells of each forward pass what its layers cannot."""

    def layout(self, model: Any, *args: Any, **kwargs: Any) -> Layout:
        """Of a call of `model` with these arguments.

        Raises:
            ValueError: a call that cannot be recorded.
        """


def check_processor(layer: Layer, expected: type, fused: type | None = None) -> Any:
    """The layer's own processor, if it is exactly of the class `expected`: a subclass may compute something else.

    `fused` is the class that ``fuse_qkv_projections`` puts in its place.

    Raises:
        TypeError: it is of another class.
    """
    own = layer.attention.processor
    if type(own) is not expected:
        hint = "; call unfuse_qkv_projections() first" if type(own) is fused else ""
        raise TypeError(
            f"{layer.name}: expected the attention processor {expected.__name__}, which recording replaces, got "
            f"{type(own).__name__}{hint}"
        )
    return own
