"""What a text model's configuration says, and which are taken: plain values, from a file or from a peer."""

import json
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from common.inputs import text_input
from common.propagate import TensorInfo

PREFIX = "hf:"
"""What the names of Hugging Face's models and data sets start with."""

DEFAULT_TOKENS = 128
"""As long as a sentence gets, unless asked for otherwise."""

TYPES = (
    "bert",
    "big_bird",
    "camembert",
    "convbert",
    "data2vec-text",
    "deberta-v2",
    "distilbert",
    "electra",
    "ernie",
    "esm",
    "eurobert",
    "jina_embeddings_v3",
    "layoutlm",
    "luke",
    "megatron-bert",
    "mobilebert",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "nystromformer",
    "rembert",
    "roc_bert",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)
"""Encoders whose layers are found and whose forward can be split."""

_POSITIONS_BEHIND_PADDING = (
    "camembert",
    "data2vec-text",
    "esm",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
)

# What a client may ask of a server's memory and patience.
MOST_PARAMETERS = 4_000_000_000
MOST_LAYERS = 512
LARGEST_LENGTH = 1 << 16
_LARGEST_CONFIG = 1 << 16
_LARGEST_NUMBER = 10_000_000

# Those that take ``token_type_ids``, unless their configuration has a single type.
_TELLS_PAIRS = (
    "bert",
    "big_bird",
    "convbert",
    "electra",
    "ernie",
    "megatron-bert",
    "mobilebert",
    "rembert",
    "roc_bert",
)

# What describes a file or names code, not a model; where attention is computed is chosen here.
_LEFT_OUT = (
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "id2label",
    "label2id",
)


def is_text(name: str) -> bool:
    """Tell a text model's name from an image model's."""
    return name.startswith(PREFIX)


def check_config(config: object) -> dict[str, Any]:
    """Check a configuration that came from a file or a peer; returns what of it describes the model.

    Raises:
        UserError: it is none, too large, or of no type in `TYPES`.
    """
    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        raise UserError("a model's configuration must be a map")
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    try:
        size = len(json.dumps(kept, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"a model's configuration must be plain values: {error}") from error
    if size > _LARGEST_CONFIG:
        raise UserError(
            f"a model's configuration of {size} bytes is too large; {_LARGEST_CONFIG} are allowed"
        )
    if kept.get("model_type") not in TYPES:
        raise UserError(
            f"models of type {str(kept.get('model_type'))[:40]!r} cannot be split; there are {', '.join(TYPES)}"
        )
    for key, value in kept.items():
        if isinstance(value, int) and value > _LARGEST_NUMBER:
            raise UserError(f"{key[:40]} of {value} in a model's configuration is too large")
        # MobileBERT's layers have so many networks each.
        if ("layers" in key or "networks" in key) and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"a model of {value} layers is too large; {MOST_LAYERS} are allowed")
    return kept


def mixes_padding(config: Mapping[str, Any] | None) -> bool:
    """Whether a model's convolutions along the tokens let padding tell on tokens, so that it has to cross."""
    return config is not None and config.get("model_type") in ("convbert", "nystromformer")


def most_tokens(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model's positions allow; None where nothing limits them."""
    positions = config.get("max_position_embeddings", 512)
    if not isinstance(positions, int) or positions < 1:
        return None
    # RoBERTa's positions begin behind that of the padding.
    padded = config.get("model_type") in _POSITIONS_BEHIND_PADDING
    padding = config.get("pad_token_id", 1)
    return positions - (padding + 1 if padded and isinstance(padding, int) else 0)


def choose_length(name: str, config: Mapping[str, Any], asked: int | None) -> int:
    """Return how many tokens a text has at most.

    Args:
        name: the model's.
        config: its configuration.
        asked: what was asked for; None for `DEFAULT_TOKENS`, or fewer where the model has fewer positions.

    Raises:
        UserError: the model has not so many.
    """
    possible = most_tokens(config) or LARGEST_LENGTH
    length = asked or min(DEFAULT_TOKENS, possible)
    if length > possible:
        raise UserError(f"--max-length {length} is too long: {name} has {possible} positions")
    return length


def inputs_of(config: Mapping[str, Any], tokens: int) -> tuple[TensorInfo, ...]:
    """Describe what a model takes, for at most so many tokens."""
    pairs = config.get("model_type") in _TELLS_PAIRS and config.get("type_vocab_size", 2) != 1
    return text_input(tokens, pairs=pairs)
