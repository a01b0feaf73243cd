"""Hugging Face's text classifiers: encoders such as BERT, RoBERTa and DistilBERT with a head.

A model is named ``hf:NAME`` on the hub or ``hf:FOLDER`` on this machine. Between edge and cloud it is described
by its configuration alone, plain values that are checked; no code of a checkpoint's is ever run, and weights are
read from safetensors only.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from common.errors import UserError
from common.stage import seeded
from common.text_config import MOST_PARAMETERS, PREFIX, check_config

if TYPE_CHECKING:
    from types import ModuleType

_log = logging.getLogger(__name__)

PRETRAINED = "pretrained"
"""Stands for the weights that come with a model's configuration."""


def source(name: str) -> str:
    """Return the hub's name, or the folder, in a text model's name."""
    return name.removeprefix(PREFIX)


def is_folder(name: str) -> bool:
    """Tell a folder on this machine from a name on the hub."""
    try:
        return Path(source(name)).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        # Too long, another's home, a null byte: a peer may send anything.
        return False


def has_weights(name: str) -> bool:
    """Whether pretrained weights come with a model: always from the hub, from a folder that holds some."""
    return not is_folder(name) or any(Path(source(name)).expanduser().glob("*.safetensors*"))


def transformers() -> "ModuleType":
    """Import transformers, quietly.

    Raises:
        UserError: it is not installed.
    """
    # transformers imports torchvision, which does not come up everywhere by itself.
    import common.vision  # noqa: F401

    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "text models need transformers, which is not installed: pip install 'isthmus[text]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the error itself is raised
    return transformers


def read_config(name: str) -> dict[str, Any]:
    """Read a model's configuration, from its folder or the hub.

    Returns:
        Plain values, as `ModelSpec.config` takes them.

    Raises:
        UserError: there is none, or it is no encoder that can be split.
    """
    library = transformers()
    where = _where(name)
    if where.startswith(("/", ".", "~")) and not is_folder(name):
        raise UserError(
            f"there is no folder {where}; hf:PATH is one that holds a model, hf:NAME a model on the hub"
        )
    try:
        config = library.AutoConfig.from_pretrained(where, trust_remote_code=False)
    except Exception as error:
        # Whatever half a dozen libraries make of what is no configuration.
        hint = "" if is_folder(name) else "; for a folder on this machine give hf:PATH"
        raise UserError(f"there is no model {name}: {_line(error)}{hint}") from error
    return check_config(json.loads(config.to_json_string(use_diff=True)))


def build_text_model(
    name: str,
    config: Mapping[str, Any],
    num_classes: int,
    *,
    seed: int,
    pretrained: bool,
    offline: bool,
    device: str = "cpu",
    whole: bool = False,
) -> nn.Module:
    """Build a text classifier on the CPU, in training mode.

    Args:
        name: the model's.
        config: as `read_config` returned it.
        num_classes: outputs of the classifier. Where the checkpoint has another number, or no classifier, it
            starts anew.
        seed: of random weights.
        pretrained: start from the weights that come with the configuration, else from random ones.
        offline: take what is on this machine and fetch nothing.
        device: ``meta`` for a structure that takes no memory.
        whole: the checkpoint is to hold all weights, the classifier's too.

    Raises:
        UserError: no such weights, or a configuration that makes no model.
    """
    library = transformers()
    settings = {**config, "num_labels": num_classes}
    try:
        parsed = library.AutoConfig.for_model(settings.pop("model_type"), **settings)
        parsed.use_cache = False
        parsed._attn_implementation = None  # sdpa where the model has it
        with torch.device("meta"):
            parameters = sum(
                p.numel() for p in library.AutoModelForSequenceClassification.from_config(parsed).parameters()
            )
    except Exception as error:
        # Whatever the library's own code makes of values that fit no model.
        raise UserError(f"the configuration of {name} makes no model: {_line(error)}") from error
    if parameters > MOST_PARAMETERS:
        raise UserError(f"{name} has {parameters:,} parameters; {MOST_PARAMETERS:,} are allowed")
    with seeded(seed, torch.device("cpu")), torch.device(device):
        model = (
            _pretrained(library, name, parsed, offline, whole)
            if pretrained
            else _random(library, name, parsed)
        )
    assert isinstance(model, nn.Module)
    return model.train()


def _random(library: Any, name: str, config: Any) -> Any:
    try:
        return library.AutoModelForSequenceClassification.from_config(config)
    except (RuntimeError, ValueError, TypeError) as error:
        # What only shows where there are numbers, such as a negative spread.
        raise UserError(f"the configuration of {name} makes no model: {_line(error)}") from error


def _pretrained(library: Any, name: str, config: Any, offline: bool, whole: bool) -> Any:
    try:
        model, info = library.AutoModelForSequenceClassification.from_pretrained(
            _where(name),
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=offline,
            dtype=torch.float32,
        )
    except Exception as error:
        # A damaged or foreign file raises whatever its reader met first.
        raise UserError(f"the weights of {name} could not be read: {_line(error)}") from error
    fresh = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if fresh and whole:
        raise UserError(
            f"{name} has no {', '.join(fresh)} for {config.num_labels} classes: it was not trained for this; give "
            "--weights FILE, as --save wrote it"
        )
    if fresh:
        _log.info("%s has no %s: they start anew", name, ", ".join(fresh))
    return model


def _where(name: str) -> str:
    return os.fspath(Path(source(name)).expanduser()) if is_folder(name) else source(name)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def tokenizer_of(name: str) -> Any:
    """Load the tokenizer that comes with a model.

    Raises:
        UserError: there is none.
    """
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(_where(name), trust_remote_code=False)
    except Exception as error:
        # The same of half a dozen kinds of files.
        raise UserError(f"{name} comes without a tokenizer that can be used: {_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Where the files are missing, there is one that knows no word.
        raise UserError(f"{name} comes without a tokenizer: its folder needs tokenizer.json or a vocabulary")
    return tokenizer
