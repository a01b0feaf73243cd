"""The published results that `benchmarks.reproduce` runs again, as data; sources in DESIGN section 8.

RoBERTa-base on CoLA: accuracy, 85.1 without compression. MobileNetV2 on CIFAR-10 at 224 px: accuracy, 95.94.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

TEXT_BASELINE, IMAGE_BASELINE = 85.1, 95.94


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table.

    Attributes:
        label: as the table has it.
        compress: values of ``--compress``, with spaces between; ``{STEPS}`` in it stands for `decay_steps`, which a
            short schedule scales.
        rate: published compress rate.
        accuracy: published, in percent.
        decay_steps: published steps from one narrowing to the next.
    """

    label: str
    compress: str
    rate: float | None = None
    accuracy: float | None = None
    decay_steps: int = 0

    def spec(self, scale: float) -> str:
        """The value of ``--compress`` for a schedule that is so much shorter."""
        return self.compress.replace("{STEPS}", str(max(1, round(self.decay_steps * scale))))


def _decay(
    steps: int,
    rate: float,
    iterations: int,
    l1: str | None,
    *,
    second: float | None = None,
    published: tuple[float, float] | None = None,
) -> Row:
    options = f"rate={rate},steps={{STEPS}},iterations={iterations}"
    options += "" if second is None else f",rate2={second}"
    options += "" if l1 is None else f",l1={l1}"
    axes = f"{rate}" if second is None else f"{rate} and {second}"
    return Row(
        label=f"{steps}, {axes}, {iterations}, {l1 or 'none'}",
        compress=f"decay:{options}",
        rate=published[0] if published else None,
        accuracy=published[1] if published else None,
        decay_steps=steps,
    )


DECAY = (
    _decay(100, 0.9, 9, None, published=(0.387, 82.9)),
    _decay(100, 0.9, 9, "1e-4"),
    _decay(200, 0.9, 9, None, published=(0.387, 83.8)),
    _decay(200, 0.9, 9, "1e-4"),
    _decay(300, 0.9, 9, None, published=(0.387, 84.3)),
    _decay(300, 0.9, 9, "1e-4", published=(0.387, 84.6)),
    _decay(500, 0.83, 5, None, published=(0.394, 83.9)),
    _decay(500, 0.83, 5, "1e-4", published=(0.394, 84.3)),
    _decay(300, 0.9, 9, None, second=0.95),
    _decay(300, 0.9, 9, "1e-4", second=0.95, published=(0.244, 83.4)),
    _decay(500, 0.9, 8, None, second=0.96),
    _decay(500, 0.9, 8, "1e-4", second=0.96, published=(0.285, 83.4)),
    _decay(300, 1, 9, None, second=0.95),
    _decay(300, 1, 9, "1e-4", second=0.95),
)
"""Steps, rate, iterations, L1: with a second rate on the sequence axis too, which a first rate of 1 leaves alone."""

LOWRANK_TEXT = (
    Row(label="rank 128", compress="lowrank:128", rate=1.17, accuracy=85.2),
    Row(label="rank 32", compress="lowrank:32", rate=0.291, accuracy=85.6),
    Row(label="rank 16", compress="lowrank:16", rate=0.146, accuracy=85.0),
    Row(label="rank 12", compress="lowrank:12", rate=0.109, accuracy=84.3),
)
LOWRANK_IMAGE = (
    Row(label="power iteration 0.100", compress="lowrank:3", rate=0.100, accuracy=95.50),
    Row(label="power iteration 0.073", compress="lowrank:2", rate=0.073, accuracy=94.75),
)
"""The ranks whose rates come nearest to the published ones at 224 px."""
LOWRANK_IMAGE_96 = (
    replace(
        LOWRANK_IMAGE[0],
        compress="cut1.act=lowrank:4 cut1.grad=lowrank:1 cut2.act=lowrank:3 cut2.grad=lowrank:1",
    ),
    replace(LOWRANK_IMAGE[1], compress="cut1=lowrank:2 cut2=lowrank:1"),
)
"""Those at 96 px. Cut 2 has 9 positions there instead of 49, of which a rank takes five times the share. In the first
row gradients get the least, and activations what that saves: they are what evaluation goes through as well."""
CONV = (
    Row(label="conv, one pair a cut", compress="conv", rate=0.097, accuracy=96.01),
    Row(label="conv, one pair a cut, narrower", compress="conv:19x4,360x1", rate=0.070, accuracy=95.87),
    Row(label="conv, two pairs a cut", compress="conv2", rate=0.038, accuracy=95.75),
)
INT8 = (
    Row(label="8 bits, per channel", compress="int8", rate=0.25, accuracy=95.83),
    Row(label="8 bits, per tensor", compress="int8:group=tensor", rate=0.25, accuracy=91.83),
)

IMAGE_CHAINS = (
    Row(label="conv, 8 bits", compress="conv+int8"),
    Row(label="conv, 4 bits", compress="conv+int4+zstd"),
    Row(label="conv, 4 bits, rotated", compress="conv+int4:hadamard+zstd"),
    Row(label="conv, 3 bits, rotated", compress="conv+int3:hadamard+zstd"),
    Row(label="two pairs, 8 bits", compress="conv2+int8+zstd"),
    Row(label="two pairs, 4 bits", compress="conv2+int4+zstd"),
    Row(label="no pair, 2 bits, rotated", compress="int2:group=64,hadamard+zstd"),
)
"""Fewer than a fiftieth of the bytes, most of them."""

TEXT_CHAINS = (
    Row(label="ragged", compress="none"),
    Row(label="ragged, 8 bits", compress="int8+zstd"),
    Row(label="ragged, 4 bits", compress="int4+zstd"),
    Row(label="ragged, 3 bits, rotated", compress="int3:hadamard+zstd"),
    Row(label="ragged, 2 bits, rotated", compress="int2:group=64,hadamard+zstd"),
    Row(label="ragged, linear 96, 4 bits", compress="linear:96+int4+zstd"),
    Row(label="ragged, linear 96, 8 bits", compress="linear:96+int8+zstd"),
)
"""Of the dense bytes at 128 tokens, padding left out."""

FLOPS = (
    ("1: no bottleneck", "none", (7.45e8, 1.93e10, 8.19e7)),
    ("2: one pair a cut", "conv", (1.25e9, 2.53e10, 1.53e9)),
    ("3: two pairs a cut", "conv2", (1.60e9, 3.40e10, 1.65e9)),
)
"""Type, what is inserted, and MACs of the three parts for a batch of 64."""

TIMES = (
    ("none", 737.41, 2.07),
    ("conv", 69.03, 0.38),
    ("int8", 184.35, 0.62),
)
"""Compression, the link rate in MiB/s that compute can fill, seconds a batch at 1 Gbit/s."""
