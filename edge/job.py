"""What a run starts from on the edge: data, the model cut in three, and the job to ask the server for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common import text_config, text_models
from common.bottleneck import with_bottleneck
from common.errors import UserError
from common.model_spec import ModelSpec
from common.models import build_model, default_image_size, is_path, model_inputs, weights_file
from common.narrowing import committed_steps
from common.optim import OptimSpec
from common.partition import Split, preset_cuts, split
from common.propagate import TensorInfo
from common.spec import STREAMS, JobSpec
from common.weights import partition_state, state_digest
from edge.bottleneck_file import Purpose
from edge.bottleneck_start import start_bottleneck
from edge.compress import check_fit, check_lengths, check_repetition, parse_compress, with_ragged
from edge.config import TrainConfig
from edge.data.datasets import open_dataset
from edge.data.loader import batch_count
from edge.data.samples import ImageSamples, Samples, TextSamples
from edge.data.text import Tokens, is_text_data, open_text
from wire.messages import Ready

DEFAULT_LR = {"sgd": 0.02, "adamw": 1e-3}
TEXT_LR = {"sgd": 0.005, "adamw": 2e-5}

RANDOM = "random"
"""As weights: random ones, even where a model comes with others."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that is settled before the first message.

    Attributes:
        config: what was asked for.
        samples: the data.
        model: what model it is.
        parts: the model cut in three, bottlenecks in place.
        initial_state: the names of the whole model's state in order; data only of what no partition uses.
        spec: what to ask the server for.
        total_steps: steps to make; 0 for an evaluation alone.
        started: where the bottleneck's first weights are from, in words; empty where that is the usual place.
    """

    config: TrainConfig
    samples: Samples
    model: ModelSpec
    parts: Split
    initial_state: Mapping[str, Tensor]
    spec: JobSpec
    total_steps: int
    started: str = ""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the training set."""
        return batch_count(self.samples.train_size, self.config.batch_size)

    def middle_state(self) -> dict[str, Tensor]:
        """The middle's initial state, as the server must have it."""
        return partition_state(self.parts.middle)


def prepare(config: TrainConfig, *, fresh_bottleneck: bool = False) -> Job:
    """Open the data, build and cut the model, and write the job down.

    Args:
        config: what was asked for.
        fresh_bottleneck: leave a bottleneck alone that comes with the model's weights.

    Raises:
        UserError: anything in the settings that does not exist or does not fit.
        SpecError: a ``--compress`` that does not parse.
    """
    compression = parse_compress(config.compress)
    check_repetition(compression, varied=config.augment and not text_config.is_text(config.model))
    samples, model_spec = _open(config)
    if config.only_evaluates and model_spec.weights is None and config.weights != RANDOM:
        raise UserError(
            f"{config.model} has random weights: give those that were trained, as --weights FILE or by name"
        )
    model = build_model(model_spec, whole=config.only_evaluates)
    inputs = model_inputs(model_spec)
    total_steps = config.steps or config.epochs * batch_count(samples.train_size, config.batch_size)
    total_steps = 0 if config.only_evaluates else total_steps
    if model_spec.config is None:
        _check_smallest_chunk(model, config, inputs, samples=samples.train_size, steps=max(total_steps, 1))
    cuts = (config.cuts[0], config.cuts[1]) if config.cuts else preset_cuts(config.model, model)
    parts = with_bottleneck(split(model, cuts, inputs), compression.bottlenecks, seed=config.seed)
    if config.ragged and not text_config.mixes_padding(model_spec.config):
        compression = with_ragged(compression, (parts.cut1, parts.cut2))
    check_lengths((parts.dense1, parts.dense2), (parts.cut1, parts.cut2), padding=config.padding)
    check_fit(compression, (parts.cut1, parts.cut2), -(-config.batch_size // config.chunks))
    purpose = Purpose.of(parts, model=config.model, cuts=cuts, bottlenecks=compression.bottlenecks)
    trained = None if fresh_bottleneck else weights_file(model_spec)
    started = start_bottleneck(config, parts, purpose, samples, trained=trained)
    used = {name for part in parts.partitions.values() for name in part.state_dict()}
    initial_state = {
        name: tensor.to("meta") if name in used else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    spec = JobSpec(
        model=replace(model_spec, weights=_known_to_the_server(model_spec)),
        cuts=cuts,
        bottlenecks=compression.bottlenecks,
        codecs={stream: compression.codecs[stream] for stream in STREAMS},
        optim=OptimSpec() if config.only_evaluates else _optim(config, total_steps),
        seed=config.seed,
        chunks=config.chunks,
        chunk_size=-(-config.batch_size // config.chunks),
        in_flight=config.chunks,
        memory_format=config.memory_format,
        amp=config.amp,
        digest=state_digest(partition_state(parts.middle)),
        trace=config.trace is not None,
        committed=committed_steps(*parts.partitions.values()),
    )
    return Job(
        config=config,
        samples=samples,
        model=model_spec,
        parts=parts,
        initial_state=initial_state,
        spec=spec,
        total_steps=total_steps,
        started=started,
    )


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


def _optim(config: TrainConfig, total_steps: int) -> OptimSpec:
    """Fill in what is usual: for images from scratch, and for text encoders that are fine-tuned."""
    text = text_config.is_text(config.model)
    optimizer = config.optimizer or ("adamw" if text else "sgd")
    usual = TEXT_LR if text else DEFAULT_LR
    return OptimSpec(
        name=optimizer,
        lr=usual[optimizer] if config.lr is None else config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        schedule=config.schedule or ("polynomial" if text else "constant"),
        warmup_steps=(total_steps // 16 if text else 0)
        if config.warmup_steps is None
        else config.warmup_steps,
        total_steps=total_steps,
        power=config.power,
        clip_norm=config.clip_norm,
    )


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


def _known_to_the_server(model: ModelSpec) -> str | None:
    """Keep a name that the server can look up itself; a path is this machine's own."""
    if model.weights is None or model.weights == text_models.PRETRAINED:
        return None if text_models.is_folder(model.name) else model.weights
    return None if is_path(model.weights) else model.weights


def describe(job: Job, ready: Ready) -> str:
    """Say in one line what is about to be trained or evaluated, and where."""
    spec, samples = job.spec, job.samples
    training = f"{samples.train_size} training and " if job.total_steps else ""
    started = f" ({job.started})" if job.started else ""
    return (
        f"{spec.model.name} on {samples.name} ({training}{samples.test_size} test samples, "
        f"{samples.what}, {len(samples.classes)} classes), cut after {spec.cuts[0]} and {spec.cuts[1]}, "
        f"compress {' '.join(job.config.compress)}{started}; the server computes on {ready.device} "
        f"({ready.memory_format})"
    )
