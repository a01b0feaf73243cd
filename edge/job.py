"""What a run starts from on the edge: data, the model cut in three, and the job to ask the server for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from common import text_config, text_models
from common.model_spec import ModelSpec
from common.models import is_path, weights_file
from common.narrowing import committed_steps
from common.optim import OptimSpec
from common.partition import Split
from common.spec import STREAMS, JobSpec
from common.weights import partition_state, state_digest
from edge.bottleneck_file import Purpose
from edge.bottleneck_start import start_bottleneck
from edge.compress import check_repetition, parse_compress
from edge.config import TrainConfig
from edge.data.loader import batch_count
from edge.data.samples import Samples
from edge.opened import count_steps, cut, fit_codecs, open_model
from wire.messages import Ready

DEFAULT_LR = {"sgd": 0.02, "adamw": 1e-3}
TEXT_LR = {"sgd": 0.005, "adamw": 2e-5}


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
    opened = open_model(config)
    samples, model_spec, model, cuts = opened.samples, opened.spec, opened.model, opened.cuts
    parts = cut(opened, cuts, compression.bottlenecks, config)
    compression = fit_codecs(opened, parts, compression, config)
    total_steps = count_steps(config, samples)
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
        chunk_size=config.chunk_size,
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
