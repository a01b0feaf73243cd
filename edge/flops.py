"""The command ``edge-client flops``: what each partition computes, and what crosses between them."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import text_config, text_models
from common.bottleneck import with_bottleneck
from common.errors import UserError
from common.exported import export_modes
from common.flops import Counting, Operation, PartCost, count_parts, profile
from common.graph import find_cut, trace
from common.model_spec import ModelSpec
from common.models import build_model, default_image_size, model_inputs
from common.narrowing import LAST, narrow_to
from common.partition import Split, preset_cuts, split
from edge.compress import parse_compress
from edge.flops_plot import plot_along

__all__ = ["Along", "Crossed", "FlopsConfig", "FlopsReport", "columns", "count_flops", "flops_command"]


@dataclass(frozen=True, kw_only=True)
class FlopsConfig:
    """What to count; each is an option of ``edge-client flops`` of the same name.

    Attributes:
        model: a name from torchvision's classifiers, a registered one, or ``hf:`` and a text model's.
        cuts: the two cut points; empty for the model's preset.
        image_size: side of the images in pixels; None for the model's own.
        max_length: tokens of a text; None for 128.
        num_classes: of the classifier; None for 1000, for text 2.
        compress: values of ``--compress``, of which the bottlenecks count.
        batch_size: samples.
        count: a value of `Counting`.
        json: print one JSON object instead of a table.
        plot: where a picture goes.
    """

    model: str = "mobilenet_v2"
    cuts: tuple[str, ...] = ()
    image_size: int | None = None
    max_length: int | None = None
    num_classes: int | None = None
    compress: tuple[str, ...] = ("none",)
    batch_size: int = 64
    count: str = Counting.TRUE.value
    json: bool = False
    plot: Path | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the model.

        Raises:
            UserError: what is wrong, and what would be right.
        """
        if len(self.cuts) not in (0, 2):
            raise UserError(
                f"a model is cut at two points, not {len(self.cuts)}: give --cut twice, or not at all"
            )
        for name, value in (
            ("batch-size", self.batch_size),
            ("image-size", self.image_size),
            ("max-length", self.max_length),
        ):
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")
        if self.plot is not None and not self.plot.absolute().parent.is_dir():
            raise UserError(f"--plot {self.plot}: there is no directory {self.plot.parent}; create it first")


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """One tensor that crosses a cut, before any codec.

    Attributes:
        cut: 1 or 2.
        name: of the operation that makes it.
        shape: with the batch.
        dtype: of an element.
        bytes: of the dense tensor.
    """

    cut: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class FlopsReport:
    """What was counted; its fields are the keys of ``--json``.

    Attributes:
        model: its name.
        image_size: side of the images in pixels; None for text.
        tokens: of a text; None for images.
        num_classes: of the classifier.
        batch_size: samples.
        compress: what was inserted.
        count: how transposed convolutions count.
        cut_points: where the model is cut.
        partitions: front, middle and back.
        cuts: what crosses, in the order of the cuts.
        macs: of the whole model, bottlenecks included.
        params: likewise.
        rate: bytes that cross over those that would without a bottleneck.
        final_width: whether a bottleneck narrows while training; it is counted as it is in the end.
    """

    model: str
    image_size: int | None
    tokens: int | None
    num_classes: int
    batch_size: int
    compress: tuple[str, ...]
    count: str
    cut_points: tuple[str, str]
    partitions: tuple[PartCost, ...]
    cuts: tuple[Crossed, ...]
    macs: int
    params: int
    rate: float
    final_width: bool

    @property
    def title(self) -> str:
        """What was counted, in a line."""
        size = f"{self.image_size} px" if self.tokens is None else f"{self.tokens} tokens"
        return (
            f"{self.model}, {size}, {self.num_classes} classes, batch of {self.batch_size}, "
            f"cut after {self.cut_points[0]} and {self.cut_points[1]}, compress {' '.join(self.compress)}"
        )

    def to_json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(asdict(self), indent=2)

    def to_text(self) -> str:
        """Return the report as tables to read."""
        costs = (*self.partitions, PartCost(name="total", macs=self.macs, params=self.params))
        parts = [
            (
                part.name,
                f"{part.macs:,}",
                f"{part.macs:.2e}",
                f"{part.macs / self.macs:.1%}",
                f"{part.params:,}",
            )
            for part in costs
        ]
        cuts = [
            (f"cut {c.cut}", "x".join(map(str, c.shape)), c.dtype, f"{c.bytes:,}", c.name) for c in self.cuts
        ]
        blocks = [
            self.title,
            columns([("partition", "MACs", "", "share", "parameters"), *parts]),
            columns([("crosses", "shape", "type", "bytes", "made by"), *cuts]),
            f"{self.rate:.3f} of the bytes without a bottleneck; codecs come on top of that",
        ]
        if self.final_width:
            blocks.append("decay is counted at its final width; training begins at the full one")
        return "\n\n".join(blocks)


@dataclass(frozen=True, kw_only=True)
class Along:
    """A model without bottlenecks, operation by operation.

    Attributes:
        operations: in the order in which they run.
        cuts: which of them each cut comes after.
    """

    operations: tuple[Operation, ...]
    cuts: tuple[int, int]


def count_flops(config: FlopsConfig) -> tuple[FlopsReport, Along | None]:
    """Count what a model costs, cut as asked.

    Returns:
        The report, and where a picture is wanted what it shows.

    Raises:
        UserError: a model, cut or bottleneck that does not exist or does not fit.
        SpecError: a ``--compress`` that does not parse.
    """
    compression = parse_compress(config.compress)
    spec = _model_of(config)
    model = build_model(spec)
    inputs, batch, counting = model_inputs(spec), config.batch_size, Counting(config.count)
    cuts = (config.cuts[0], config.cuts[1]) if config.cuts else preset_cuts(config.model, model)
    parts = with_bottleneck(split(model, cuts, inputs), compression.bottlenecks, seed=0)
    final_width = bool(parts.shapes)
    narrow_to(LAST, *parts.partitions.values())
    parts = replace(parts, cut1=parts.crossing(1, LAST), cut2=parts.crossing(2, LAST), shapes={})
    along = None
    if config.plot is not None:
        traced = trace(model, training=False) if spec.config is None else export_modes(model, inputs)[False]
        along = Along(
            operations=tuple(profile(model, traced, inputs, batch, counting)),
            cuts=(find_cut(traced, cuts[0]), find_cut(traced, cuts[1])),
        )
    partitions = tuple(count_parts(parts, batch, counting))
    crossed = _crossed(parts, batch)
    report = FlopsReport(
        model=config.model,
        image_size=spec.image_size,
        tokens=spec.tokens,
        num_classes=spec.num_classes,
        batch_size=batch,
        compress=config.compress,
        count=config.count,
        cut_points=cuts,
        partitions=partitions,
        cuts=crossed,
        macs=sum(part.macs for part in partitions),
        params=sum(part.params for part in partitions),
        rate=sum(tensor.bytes for tensor in crossed) / parts.dense_bytes(batch),
        final_width=final_width,
    )
    return report, along


def _model_of(config: FlopsConfig) -> ModelSpec:
    if not text_config.is_text(config.model):
        size = config.image_size or default_image_size(config.model)
        return ModelSpec(name=config.model, num_classes=_default(config.num_classes, 1000), image_size=size)
    description = text_models.read_config(config.model)
    return ModelSpec(
        name=config.model,
        num_classes=_default(config.num_classes, 2),
        config=description,
        tokens=text_config.choose_length(config.model, description, config.max_length),
    )


def _default(number: int | None, otherwise: int) -> int:
    return otherwise if number is None else number


def flops_command(config: FlopsConfig) -> None:
    """Count, draw if asked to, and print."""
    report, along = count_flops(config)
    if along is not None and config.plot is not None:
        crossing = [sum(c.bytes for c in report.cuts if c.cut == cut) for cut in (1, 2)]
        plot_along(config.plot, report.title, along.operations, along.cuts, crossing)
    sys.stdout.write(f"{report.to_json() if config.json else report.to_text()}\n")


def _crossed(parts: Split, batch: int) -> tuple[Crossed, ...]:
    return tuple(
        Crossed(
            cut=cut,
            name=info.name,
            shape=info.batched(batch),
            dtype=str(info.dtype).removeprefix("torch."),
            bytes=info.dense_bytes(batch),
        )
        for cut, infos in ((1, parts.cut1), (2, parts.cut2))
        for info in infos
    )


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Lay rows out in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
    return "\n".join(lines)
