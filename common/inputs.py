"""What models take."""

from collections.abc import Iterable

import torch
from torch import Tensor

from common.propagate import TensorInfo


def image_input(size: int, channels: int = 3) -> tuple[TensorInfo, ...]:
    """Describe the input of an image classifier: `[B, channels, size, size]`, float32."""
    return (TensorInfo(name="x", shape=(channels, size, size)),)


def text_input(most_tokens: int, *, pairs: bool = False) -> tuple[TensorInfo, ...]:
    """Describe the input of a text classifier: token ids `[B, S]`, and which of them are no padding.

    Args:
        most_tokens: the largest S.
        pairs: the model tells first sentence and second by ``token_type_ids``.
    """

    def tokens(name: str, dtype: torch.dtype) -> TensorInfo:
        return TensorInfo(name=name, shape=(most_tokens,), dtype=dtype, token_dims=(0,))

    types = (tokens("token_type_ids", torch.int64),) if pairs else ()
    return (tokens("input_ids", torch.int64), tokens("attention_mask", torch.bool), *types)


def padding_mask(inputs: Iterable[Tensor]) -> Tensor | None:
    """Return which tokens of a text classifier's inputs are no padding, ``[B, S]``; None for images."""
    return next((given for given in inputs if given.dtype == torch.bool and given.dim() == 2), None)
