"""The job: everything that both sides must agree on before the first step, as plain values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from common.choices import AMP, MEMORY_FORMATS
from common.errors import UserError
from common.model_spec import ModelSpec
from common.models import is_path
from common.optim import OptimSpec
from common.text_config import LARGEST_LENGTH, check_config

CUTS = (1, 2)
DIRECTIONS = ("act", "grad")
STREAMS = tuple(f"cut{cut}.{direction}" for cut in CUTS for direction in DIRECTIONS)
"""Every stream of tensors: activations go up at cut 1 and down at cut 2, gradients the other way."""

MAX_CHUNKS = 4096
MAX_CHUNK_SIZE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """What the client asks the server to train.

    Attributes:
        model: the model and its initial weights.
        cuts: the two cut points.
        bottlenecks: the bottleneck's specification at cut 1 and cut 2, empty for none.
        codecs: the codec chain of each stream in `STREAMS`.
        optim: the optimizer and its schedule.
        seed: of every random number in the run.
        chunks: chunks a step.
        chunk_size: samples in the largest chunk.
        in_flight: most chunks between their first forward and their last backward.
        memory_format: one of `MEMORY_FORMATS`; ``auto`` lets the server measure.
        amp: one of `AMP`: autocast on the server.
        digest: of the middle's initial state, so that weights cross only when they differ.
        trace: whether the server reports what it did when.
        committed: steps that layers which narrow have seen before the job's first.
    """

    model: ModelSpec
    cuts: tuple[str, str]
    bottlenecks: tuple[str, str] = ("", "")
    codecs: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(STREAMS, "none"))
    optim: OptimSpec
    seed: int = 0
    chunks: int = 8
    chunk_size: int = 8
    in_flight: int = 8
    memory_format: str = "auto"
    amp: str = "none"
    digest: str = ""
    trace: bool = False
    committed: int = 0

    def __post_init__(self) -> None:
        """Check ranges and choices.

        Raises:
            UserError: the field, what it is, and what it may be.
        """
        if set(self.codecs) != set(STREAMS):
            raise UserError(f"a codec chain is needed for each of {', '.join(STREAMS)}")
        for name, value, choices in (
            ("memory format", self.memory_format, MEMORY_FORMATS),
            ("amp", self.amp, AMP),
        ):
            if value not in choices:
                raise UserError(f"{name} {value!r} is not one of {', '.join(choices)}")
        for name, number, low, high in (
            ("chunks", self.chunks, 1, MAX_CHUNKS),
            ("chunk size", self.chunk_size, 1, MAX_CHUNK_SIZE),
            ("chunks in flight", self.in_flight, 1, MAX_CHUNKS),
            ("seed", self.seed, 0, (1 << 63) - 1),
            ("committed steps", self.committed, 0, 1 << 53),
            ("the model's seed", self.model.seed, 0, (1 << 63) - 1),
            ("the most tokens", self.model.tokens or 1, 1, LARGEST_LENGTH),
        ):
            if not low <= number <= high:
                raise UserError(f"{name} must be from {low} to {high}, not {number}")

    def to_map(self) -> dict[str, Any]:
        """Return the job as plain values that msgpack carries."""
        return {
            **asdict(self),
            "cuts": list(self.cuts),
            "bottlenecks": list(self.bottlenecks),
            "codecs": dict(self.codecs),
            "optim": self.optim.to_map(),
        }

    @classmethod
    def from_map(cls, values: Mapping[str, Any]) -> "JobSpec":
        """Build a job from what a peer sent, trusting nothing.

        Raises:
            UserError: a field is missing, unknown, of the wrong type or out of range.
        """
        checked = _checked("job", values, _JOB_TYPES)
        model = _checked("model", checked.pop("model"), _MODEL_TYPES)
        if model["config"] is not None:
            model["config"] = check_config(model["config"])
        if model["weights"] is not None and is_path(model["weights"]):
            raise UserError("a job names pretrained weights by name, never by a path")
        cuts, bottlenecks = (
            _pair("cuts", checked.pop("cuts")),
            _pair("bottlenecks", checked.pop("bottlenecks")),
        )
        optim = OptimSpec.from_map(checked.pop("optim"))
        codecs = checked.pop("codecs")
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in codecs.items()):
            raise UserError("codecs must map stream names to chains")
        return cls(
            **checked,
            model=ModelSpec(**model),
            cuts=cuts,
            bottlenecks=bottlenecks,
            codecs=dict(codecs),
            optim=optim,
        )


_JOB_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "cuts": list,
    "bottlenecks": list,
    "codecs": dict,
    "optim": dict,
    "seed": int,
    "chunks": int,
    "chunk_size": int,
    "in_flight": int,
    "memory_format": str,
    "amp": str,
    "digest": str,
    "trace": bool,
    "committed": int,
}
_MODEL_TYPES: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "num_classes": int,
    "weights": (str, type(None)),
    "seed": int,
    "image_size": (int, type(None)),
    "config": (dict, type(None)),
    "tokens": (int, type(None)),
}


def _checked(what: str, values: object, types: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise UserError(f"the {what} must be a map")
    if set(values) != set(types):
        odd = ", ".join(sorted(str(k)[:40] for k in set(values) ^ set(types)))
        raise UserError(f"the {what} has missing or unknown fields: {odd}")
    for key, kind in types.items():
        value = values[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"the {what}'s {key} has type {type(value).__name__}")
    return dict(values)


def _pair(what: str, values: list[Any]) -> tuple[str, str]:
    if len(values) != 2 or not all(isinstance(v, str) for v in values):
        raise UserError(f"{what} must be two strings")
    return values[0], values[1]
