"""Which model is trained, as edge and cloud tell each other."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model, and what it starts from.

    Attributes:
        name: of a torchvision classifier or of a registered model, or ``hf:`` and a text model's.
        num_classes: outputs of the classifier. Where the checkpoint has another number, the last layer starts
            anew.
        weights: torchvision's name (``IMAGENET1K_V1``, ``DEFAULT``), ``pretrained`` for those that come with a
            text model, the path of a state dict (``.safetensors``, or ``.pt``/``.pth`` of plain tensors), or None
            for random weights.
        seed: of random weights.
        image_size: side of the square input in pixels, for models that are built for one (vision
            transformers); None for the model's own.
        config: of a text model, as `common.text_models.read_config` returns it; None for images.
        tokens: the most tokens that a text model is given.
    """

    name: str
    num_classes: int
    weights: str | None = None
    seed: int = 0
    image_size: int | None = None
    config: Mapping[str, Any] | None = None
    tokens: int | None = None
