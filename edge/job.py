"""What a run starts from on the edge: data, the model cut in three, and the job to ask the server for."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.bottleneck import start_from_samples, with_bottleneck
from common.errors import UserError
from common.models import ModelSpec, build_model, default_image_size, is_path
from common.optim import OptimSpec
from common.partition import Split, image_input, preset_cuts, split
from common.spec import STREAMS, JobSpec
from common.weights import partition_state, state_digest
from edge.bottleneck_file import Purpose, load_bottleneck
from edge.compress import check_fit, parse_compress
from edge.config import TrainConfig
from edge.data.augment import to_tensor
from edge.data.datasets import Dataset, open_dataset
from edge.data.draws import epoch_order
from edge.data.loader import batch_count
from wire.messages import Ready

START_SAMPLES = 32
"""Images that bottlenecks are started from."""

DEFAULT_LR = {"sgd": 0.02, "adamw": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that is settled before the first message.

    Attributes:
        config: what was asked for.
        dataset: the data.
        image_size: side of the images in pixels.
        model: what model it is.
        parts: the model cut in three, bottlenecks in place.
        initial_state: the names of the whole model's state in order; data only of what no partition uses.
        spec: what to ask the server for.
        total_steps: steps to make.
    """

    config: TrainConfig
    dataset: Dataset
    image_size: int
    model: ModelSpec
    parts: Split
    initial_state: Mapping[str, Tensor]
    spec: JobSpec
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the training set."""
        return batch_count(len(self.dataset.train), self.config.batch_size)

    def middle_state(self) -> dict[str, Tensor]:
        """The middle's initial state, as the server must have it."""
        return partition_state(self.parts.middle)


def prepare(config: TrainConfig) -> Job:
    """Open the data, build and cut the model, and write the job down.

    Raises:
        UserError: anything in the settings that does not exist or does not fit.
        SpecError: a ``--compress`` that does not parse.
    """
    compression = parse_compress(config.compress)
    dataset = open_dataset(
        config.data,
        seed=config.seed,
        root=config.data_root,
        train_limit=config.train_limit,
        test_limit=config.test_limit,
        download=True,
    )
    num_classes = config.num_classes or len(dataset.classes)
    if num_classes < len(dataset.classes):
        raise UserError(
            f"--num-classes {num_classes} is too few: {dataset.name} has {len(dataset.classes)} classes"
        )
    model_spec = ModelSpec(
        name=config.model,
        num_classes=num_classes,
        weights=config.weights,
        seed=config.seed,
        image_size=config.image_size,
    )
    model = build_model(model_spec)
    image_size = config.image_size or default_image_size(config.model, _torchvision_weights(config.weights))
    total_steps = config.steps or config.epochs * batch_count(len(dataset.train), config.batch_size)
    _check_smallest_chunk(model, config, image_size, samples=len(dataset.train), steps=total_steps)
    cuts = (config.cuts[0], config.cuts[1]) if config.cuts else preset_cuts(config.model)
    parts = with_bottleneck(
        split(model, cuts, image_input(image_size)), compression.bottlenecks, seed=config.seed
    )
    check_fit(compression, (parts.cut1, parts.cut2), -(-config.batch_size // config.chunks))
    if config.bottleneck is not None:
        purpose = Purpose.of(parts, model=config.model, cuts=cuts, bottlenecks=compression.bottlenecks)
        load_bottleneck(config.bottleneck, parts, purpose)
    elif any(compression.bottlenecks):
        images = _first_images(config, dataset, image_size)
        start_from_samples(parts, compression.bottlenecks, (images,), seed=config.seed)
    used = {name for part in parts.partitions.values() for name in part.state_dict()}
    initial_state = {
        name: tensor.to("meta") if name in used else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    spec = JobSpec(
        model=ModelSpec(
            name=config.model,
            num_classes=num_classes,
            weights=_torchvision_weights(config.weights),
            seed=config.seed,
            image_size=image_size,
        ),
        cuts=cuts,
        bottlenecks=compression.bottlenecks,
        codecs={stream: compression.codecs[stream] for stream in STREAMS},
        optim=OptimSpec(
            name=config.optimizer,
            lr=DEFAULT_LR.get(config.optimizer, 1e-3) if config.lr is None else config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            total_steps=total_steps,
            power=config.power,
            clip_norm=config.clip_norm,
        ),
        seed=config.seed,
        chunks=config.chunks,
        chunk_size=-(-config.batch_size // config.chunks),
        in_flight=config.chunks,
        memory_format=config.memory_format,
        amp=config.amp,
        digest=state_digest(partition_state(parts.middle)),
        trace=config.trace is not None,
    )
    return Job(
        config=config,
        dataset=dataset,
        image_size=image_size,
        model=model_spec,
        parts=parts,
        initial_state=initial_state,
        spec=spec,
        total_steps=total_steps,
    )


def _check_smallest_chunk(
    model: nn.Module, config: TrainConfig, image_size: int, *, samples: int, steps: int
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
            functional_call(model, state, (torch.empty(1, 3, image_size, image_size, device="meta"),))
    except ValueError as error:
        raise UserError(
            f"{config.model} cannot train on a chunk of one sample at {image_size} px ({error}), and a batch of "
            f"{single[0]} samples in {config.chunks} chunks has one: change --batch-size, --chunks or --image-size"
        ) from error


def _last_chunk(batch: int, chunks: int) -> int:
    """Return how many samples the last chunk has, as `torch.chunk` cuts."""
    size = -(-batch // chunks)
    return batch % size or size


def _first_images(config: TrainConfig, dataset: Dataset, image_size: int) -> Tensor:
    """Return a few training images as they are, without variation."""
    order = epoch_order(len(dataset.train), config.seed, 0)
    return to_tensor(dataset.train.fetch(order[:START_SAMPLES], image_size), image_size, dataset.normalise)


def _torchvision_weights(weights: str | None) -> str | None:
    """Keep a name that the server can look up itself; a path is this machine's own."""
    return None if weights is not None and is_path(weights) else weights


def describe(job: Job, ready: Ready) -> str:
    """Say in one line what is about to be trained, and where."""
    spec, dataset = job.spec, job.dataset
    return (
        f"{spec.model.name} on {dataset.name} ({len(dataset.train)} training and {len(dataset.test)} test images, "
        f"{len(dataset.classes)} classes, {job.image_size} px), cut after {spec.cuts[0]} and {spec.cuts[1]}, "
        f"compress {' '.join(job.config.compress)}; the server computes on {ready.device} ({ready.memory_format})"
    )
