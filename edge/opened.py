"""The data and the model of a run: opened and built as its settings say, then cut and compressed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from common import text_config, text_models
from common.bottleneck import with_bottleneck
from common.errors import UserError
from common.model_spec import ModelSpec
from common.models import build_model, default_image_size, is_path, model_inputs
from common.partition import Split, preset_cuts, split
from common.propagate import TensorInfo
from edge.compress import Compression, check_fit, check_lengths, with_ragged
from edge.config import TrainConfig
from edge.data.datasets import open_dataset
from edge.data.loader import batch_count
from edge.data.samples import ImageSamples, Samples, TextSamples
from edge.data.text import Tokens, is_text_data, open_text

RANDOM = "random"
"""As weights: random ones, even where a model comes with others."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The data and the model, before it is cut.

    Attributes:
        samples: the data.
        spec: what model it is.
        model: itself.
        inputs: what it takes.
        cuts: the two cut points that were asked for, or its preset.
    """

    samples: Samples
    spec: ModelSpec
    model: nn.Module
    inputs: tuple[TensorInfo, ...]
    cuts: tuple[str, str]


def open_model(config: TrainConfig) -> Opened:
    """Open the data, and build the model that fits them.

    Raises:
        UserError: as `prepare`.
    """
    samples, spec = _open(config)
    if config.only_evaluates and spec.weights is None and config.weights != RANDOM:
        raise UserError(
            f"{config.model} has random weights: give those that were trained, as --weights FILE or by name"
        )
    model = build_model(spec, whole=config.only_evaluates)
    inputs = model_inputs(spec)
    if spec.config is None:
        steps = max(count_steps(config, samples), 1)
        _check_smallest_chunk(model, config, inputs, samples=samples.train_size, steps=steps)
    cuts = (config.cuts[0], config.cuts[1]) if config.cuts else preset_cuts(config.model, model)
    return Opened(samples=samples, spec=spec, model=model, inputs=inputs, cuts=cuts)


def cut(opened: Opened, cuts: tuple[str, str], bottlenecks: tuple[str, str], config: TrainConfig) -> Split:
    """Cut a model in three, and insert bottlenecks.

    Raises:
        UserError: a cut or a bottleneck does not fit.
    """
    return with_bottleneck(split(opened.model, cuts, opened.inputs), bottlenecks, seed=config.seed)


def fit_codecs(opened: Opened, parts: Split, compression: Compression, config: TrainConfig) -> Compression:
    """Leave padding out of what crosses, where there is any, and check that the codecs suit the rest.

    Raises:
        UserError: one does not.
    """
    if config.ragged and not text_config.mixes_padding(opened.spec.config):
        compression = with_ragged(compression, (parts.cut1, parts.cut2))
    check_lengths((parts.dense1, parts.dense2), (parts.cut1, parts.cut2), padding=config.padding)
    check_fit(compression, (parts.cut1, parts.cut2), config.chunk_size)
    return compression


def count_steps(config: TrainConfig, samples: Samples) -> int:
    """Return how many steps a run takes; 0 for an evaluation alone."""
    if config.only_evaluates:
        return 0
    return config.steps or config.epochs * batch_count(samples.train_size, config.batch_size)


def _open(config: TrainConfig) -> tuple[Samples, ModelSpec]:
    """Open the data, and describe the model that fits them."""
    text = text_config.is_text(config.model)
    if text is not is_text_data(config.data):
        one, other = ("text", "images") if text else ("images", "text")
        fitting = "cola:PATH or hf:NAME" if text else "digits, cifar10 or folder:PATH"
        raise UserError(
            f"{config.model} takes {one} and --data {config.data} holds {other}; give --data {fitting}, or "
            "another --model"
        )
    return _open_text(config) if text else _open_images(config)


def _open_images(config: TrainConfig) -> tuple[Samples, ModelSpec]:
    if config.max_length is not None:
        raise UserError(f"--max-length is for text, and {config.model} takes images; leave it out")
    dataset = open_dataset(
        config.data,
        seed=config.seed,
        root=config.data_root,
        train_limit=config.train_limit,
        test_limit=config.test_limit,
        download=True,
    )
    weights = None if config.weights == RANDOM else config.weights
    published = None if weights is None or is_path(weights) else weights
    num_classes = _num_classes(config, dataset.classes)
    spec = ModelSpec(
        name=config.model,
        num_classes=num_classes,
        weights=weights,
        seed=config.seed,
        image_size=config.image_size or default_image_size(config.model, published),
    )
    assert spec.image_size is not None
    return ImageSamples(dataset, spec.image_size, seed=config.seed, augment=config.augment), spec


def _open_text(config: TrainConfig) -> tuple[Samples, ModelSpec]:
    if config.image_size is not None:
        raise UserError(f"--image-size is for images, and {config.model} takes text; leave it out")
    description = text_models.read_config(config.model)
    dataset = open_text(
        config.data, seed=config.seed, train_limit=config.train_limit, test_limit=config.test_limit
    )
    weights = config.weights
    if weights in (None, "DEFAULT", text_models.PRETRAINED):
        has_some = weights is not None or text_models.has_weights(config.model)
        weights = text_models.PRETRAINED if has_some else None
    spec = ModelSpec(
        name=config.model,
        num_classes=_num_classes(config, dataset.classes),
        weights=None if weights == RANDOM else weights,
        seed=config.seed,
        config=description,
        tokens=text_config.choose_length(config.model, description, config.max_length),
    )
    tokens = Tokens(config.model, model_inputs(spec), longest=config.padding == "longest")
    return TextSamples(dataset, tokens, seed=config.seed), spec


def _num_classes(config: TrainConfig, classes: Sequence[str]) -> int:
    number = config.num_classes or len(classes)
    if number < len(classes):
        raise UserError(f"--num-classes {number} is too few: {config.data} has {len(classes)} classes")
    return number


def _check_smallest_chunk(
    model: nn.Module, config: TrainConfig, inputs: Sequence[TensorInfo], *, samples: int, steps: int
) -> None:
    """Find out before training whether a chunk of a single sample, where there will be one, can be normalised.

    BatchNorm needs more than one value of each channel, which one small image does not give it.
    """
    full, rest = divmod(samples, config.batch_size)
    batches = [config.batch_size] * (full > 0) + [rest] * (rest > 0 and steps > full)
    single = [size for size in batches if _last_chunk(size, config.chunks) == 1]
    if not single:
        return
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            functional_call(model, state, tuple(torch.empty(i.batched(1), device="meta") for i in inputs))
    except ValueError as error:
        raise UserError(
            f"{config.model} cannot train on a chunk of one sample at {inputs[0].shape[-1]} px ({error}), and a batch "
            f"of {single[0]} samples in {config.chunks} chunks has one: change --batch-size, --chunks or --image-size"
        ) from error


def _last_chunk(batch: int, chunks: int) -> int:
    """Return how many samples the last chunk has, as `torch.chunk` cuts."""
    size = -(-batch // chunks)
    return batch % size or size
