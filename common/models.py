"""Models by name: torchvision's classifiers, Hugging Face's text encoders and those that a user registers."""

import difflib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from common import text_config, text_models
from common.errors import UserError
from common.matching import AUXILIARY, load_matching
from common.model_spec import ModelSpec
from common.partition import image_input
from common.propagate import TensorInfo
from common.stage import seeded
from common.vision import models as vision_models
from common.weights import load_state

_registered: dict[str, Callable[..., nn.Module]] = {}
_registering = threading.Lock()

DEFAULT_IMAGE_SIZE = 224

# What a client may ask of a server's memory.
MOST_CLASSES = 100_000
LARGEST_IMAGE = 4096


def register_model(name: str, builder: Callable[..., nn.Module]) -> None:
    """Make a model of your own known by name, on the edge and on the cloud alike.

    Args:
        name: what `ModelSpec.name` will say.
        builder: called with ``num_classes=N``; returns the module with random weights from torch's default
            generator.

    Raises:
        UserError: the name is taken by another model.
    """
    with _registering:
        if (
            name in vision_models.list_models(module=vision_models)
            or _registered.get(name, builder) is not builder
        ):
            raise UserError(f"the model name {name!r} is taken; register yours under another")
        _registered[name] = builder


def is_registered(name: str) -> bool:
    """Tell a model of the user's own from torchvision's."""
    return name in _registered


def list_models() -> list[str]:
    """Return the names of all models that can be built, sorted."""
    return sorted({*vision_models.list_models(module=vision_models), *_registered})


def default_image_size(name: str, weights: str | None = None) -> int:
    """Return the side, in pixels, of the images that a model was made for: 299 for inception, 224 for most.

    Args:
        name: a model's name.
        weights: torchvision's name of the weights to start from, which may want a size of their own.

    Raises:
        UserError: there is no such model or weights.
    """
    _check_name(name)
    published = None if weights is None or is_path(weights) else weights
    if name in _registered or (published is None and _input_size_option(name)):
        return DEFAULT_IMAGE_SIZE
    chosen = _named_weights(name, published or "DEFAULT")
    return int(getattr(chosen.transforms, "keywords", {}).get("crop_size", DEFAULT_IMAGE_SIZE))


def model_inputs(spec: ModelSpec) -> tuple[TensorInfo, ...]:
    """Describe what a model takes.

    Raises:
        UserError: a text model has no place for so many tokens.
    """
    if spec.config is None:
        return image_input(spec.image_size or default_image_size(spec.name))
    possible = text_config.most_tokens(spec.config)
    if spec.tokens and possible is not None and spec.tokens > possible:
        raise UserError(f"{spec.name} has {possible} positions, too few for texts of {spec.tokens} tokens")
    return text_config.inputs_of(spec.config, spec.tokens or text_config.DEFAULT_TOKENS)


def build_model(
    spec: ModelSpec, *, offline: bool = False, device: str = "cpu", whole: bool = False
) -> nn.Module:
    """Build a model on the CPU, in training mode: a pure function of the spec and of the file that it names.

    Random weights come from torch's default generator seeded with ``spec.seed``, which is put back as it was.

    Args:
        spec: what to build.
        offline: take a text model's weights from this machine, and fetch none.
        device: ``meta`` for a structure that takes no memory, of random weights only.
        whole: the weights are to hold a classifier of as many classes, which otherwise starts anew.

    Raises:
        UserError: no such model or weights, weights that cannot be fetched or read, or that belong to another
            model.
    """
    if spec.config is None:
        _check_name(spec.name)
    for what, number, most in (
        ("number of classes", spec.num_classes, MOST_CLASSES),
        ("image size", spec.image_size or DEFAULT_IMAGE_SIZE, LARGEST_IMAGE),
    ):
        if not 1 <= number <= most:
            raise UserError(f"the {what} must be from 1 to {most}, not {number}")
    if spec.config is not None and spec.weights == text_models.PRETRAINED:
        return _build_text(spec, spec.config, pretrained=True, offline=offline, whole=whole)
    if spec.config is not None and spec.weights is not None and not is_path(spec.weights):
        raise UserError(
            f"{spec.name} has no weights {spec.weights!r}; there are pretrained and random; or give a .safetensors or "
            ".pt file's path"
        )
    file = weights_file(spec)
    if spec.weights is None or file is not None:
        model = _build_random(spec, device=device)
        if file is not None:
            load_matching(model, load_state(file), spec, str(spec.weights), whole=whole)
        return model.train()
    pretrained = _build_pretrained(spec)
    size = spec.image_size or default_image_size(spec.name, spec.weights)
    if spec.num_classes == len(_named_weights(spec.name, spec.weights).meta["categories"]) and (
        _input_size_option(spec.name) is None or size == default_image_size(spec.name, spec.weights)
    ):
        return pretrained.train()
    transform_input = getattr(pretrained, "transform_input", False)
    model = _build_random(spec, image_size=size, transform_input=transform_input)
    load_matching(model, _resized(pretrained.state_dict(), spec, size), spec, spec.weights, whole=whole)
    return model.train()


def _check_name(name: str) -> None:
    names = list_models()
    if name not in names:
        close = difflib.get_close_matches(name.lower(), names, n=4, cutoff=0.5)
        if close:
            raise UserError(
                f"unknown model {name!r}; close names: {', '.join(close)}; the name '?' lists all {len(names)}"
            )
        raise UserError(f"unknown model {name!r}; there are {', '.join(names)}")


def is_path(weights: str) -> bool:
    """Tell a state dict's file from torchvision's name of weights."""
    return weights.endswith((".safetensors", ".pt", ".pth")) or "/" in weights


def weights_file(spec: ModelSpec) -> Path | None:
    """Return the file of a state dict that a spec names as weights; those of a registered model are always one."""
    if spec.weights is None or not (spec.name in _registered or is_path(spec.weights)):
        return None
    return Path(spec.weights)


def _named_weights(name: str, weights: str) -> Any:
    choices = vision_models.get_model_weights(name)
    short = weights.rpartition(".")[2]
    if short not in choices.__members__:
        exist = ", ".join(("DEFAULT", *(member.name for member in choices)))
        raise UserError(
            f"{name} has no weights {weights!r}; there are {exist}; or give a file's path, such as ./{weights}"
        )
    return choices[short]


def _input_size_option(name: str) -> str | None:
    """The builder's option for the image size, of models whose weights depend on it."""
    return "image_size" if name.startswith("vit_") else "input_size" if name.startswith("maxvit") else None


def _builder_options(spec: ModelSpec, image_size: int | None, transform_input: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if spec.name in AUXILIARY:
        options |= {"aux_logits": False, "transform_input": transform_input}
        # Without the option torchvision warns; with it each layer takes a truncated normal, as published.
        options |= {"init_weights": True}
    option = _input_size_option(spec.name)
    if option and image_size:
        options[option] = image_size if option == "image_size" else (image_size, image_size)
    return options


def _build_text(
    spec: ModelSpec,
    config: Mapping[str, Any],
    *,
    pretrained: bool = False,
    offline: bool = True,
    device: str = "cpu",
    whole: bool = False,
) -> nn.Module:
    return text_models.build_text_model(
        spec.name,
        config,
        spec.num_classes,
        seed=spec.seed,
        pretrained=pretrained,
        offline=offline,
        device=device,
        whole=whole,
    )


def _build_random(
    spec: ModelSpec, *, image_size: int | None = None, transform_input: bool = False, device: str = "cpu"
) -> nn.Module:
    if spec.config is not None:
        return _build_text(spec, spec.config, device=device)
    with seeded(spec.seed, torch.device("cpu")), torch.device(device):
        if spec.name in _registered:
            builder = _registered[spec.name]
            return builder(num_classes=spec.num_classes)
        options = _builder_options(spec, image_size or spec.image_size, transform_input)
        try:
            model = vision_models.get_model(spec.name, weights=None, num_classes=spec.num_classes, **options)
        except (ValueError, RuntimeError, AssertionError) as error:
            size = image_size or spec.image_size
            raise UserError(f"{spec.name} cannot be built for {size} px: {error}") from error
    assert isinstance(model, nn.Module)
    return model


def _build_pretrained(spec: ModelSpec) -> nn.Module:
    assert spec.weights is not None
    chosen = _named_weights(spec.name, spec.weights)
    options = {"aux_logits": False} if spec.name in AUXILIARY else {}
    try:
        model = vision_models.get_model(spec.name, weights=chosen, progress=False, **options)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"the weights {spec.weights} of {spec.name} could not be fetched ({error}); "
            f"download {chosen.url} elsewhere and give the file's path"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def _resized(state: Mapping[str, Tensor], spec: ModelSpec, size: int) -> Mapping[str, Tensor]:
    """Interpolate a vision transformer's position embeddings to the grid of another image size."""
    if not spec.name.startswith("vit_"):
        return state
    patch = state["conv_proj.weight"].shape[-1]
    resize = vision_models.vision_transformer.interpolate_embeddings
    resized: Mapping[str, Tensor] = resize(size, patch, OrderedDict(state))
    return resized
