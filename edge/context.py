"""What every pass over the data works with, and how it is scored."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.lanes import DECODE, ENCODE, Lanes
from common.memory_format import FORMATS
from common.narrowing import committed_steps
from common.partition import Split
from common.propagate import TensorInfo
from common.stage import Stage
from edge.job import Job
from edge.link import Link
from wire.streams import StreamDecoder, StreamEncoder, uses_ids


@dataclass(kw_only=True)
class Score:
    """Losses and hits, added up chunk by chunk.

    Attributes:
        loss_sum: sum of the losses of the samples.
        predicted: the classes of the largest logits, chunk by chunk.
        labels: the right classes, chunk by chunk.
    """

    loss_sum: float = 0.0
    predicted: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """How many there were."""
        return sum(map(len, self.labels))

    @property
    def loss(self) -> float:
        """Mean over the samples."""
        return self.loss_sum / self.samples

    @property
    def accuracy(self) -> float:
        """The share of samples that were right."""
        hits = sum(int((p == y).sum()) for p, y in zip(self.predicted, self.labels, strict=True))
        return hits / self.samples

    @property
    def mcc(self) -> float:
        """Matthews' correlation coefficient, -1 to 1; 0 where all predictions are the same."""
        from sklearn.metrics import matthews_corrcoef  # slow to import, and needed for text only

        return float(matthews_corrcoef(torch.cat(self.labels).numpy(), torch.cat(self.predicted).numpy()))

    def add(self, mean_loss: float, logits: Tensor, labels: Tensor) -> None:
        """Count one chunk."""
        self.loss_sum += mean_loss * len(labels)
        self.predicted.append(logits.argmax(dim=1))
        self.labels.append(labels)


@dataclass(kw_only=True)
class Context:
    """What every pass works with.

    Attributes:
        link: an open job.
        front: the first partition.
        back: the last partition.
        parts: which tensor goes where.
        codecs: the codec chain of each stream.
        lanes: compute, encode and decode threads.
        seed: the run's seed.
        trim: drops what pads all the samples of a chunk.
        max_bytes: the largest tensor that a chunk may bring.
        committed: steps committed so far, which what crosses may depend on.
        encoders: of training, by cut: activations at cut 1, gradients at cut 2.
        decoders: of training, by cut: gradients at cut 1, activations at cut 2.
        uses_ids: whether the chunks of a training step take their samples' ids along.
    """

    link: Link
    front: Stage
    back: Stage
    parts: Split
    codecs: dict[str, str]
    lanes: Lanes
    seed: int
    trim: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    max_bytes: int
    committed: int = 0
    encoders: dict[int, StreamEncoder] = field(init=False)
    decoders: dict[int, StreamDecoder] = field(init=False)
    uses_ids: bool = field(init=False)

    def __post_init__(self) -> None:
        """Make the streams of training."""
        self.encoders = {1: self.encoder("cut1.act"), 2: self.encoder("cut2.grad")}
        self.decoders = {1: self.decoder("cut1.grad"), 2: self.decoder("cut2.act")}
        self.uses_ids = uses_ids(self.codecs)

    def crossing(self, cut: int, *, gradients: bool) -> list[TensorInfo]:
        """Describe what crosses a cut, in order: all of it forward, what needs a gradient backward."""
        infos = self.parts.crossing(cut, self.committed)
        return [info for info in infos if info.requires_grad or not gradients]

    def tokens(self, inputs: tuple[Tensor, ...]) -> int | None:
        """Return how many tokens the front's inputs have; None for images."""
        return self.parts.inputs[0].tokens(inputs[0].shape)

    def back_inputs(self, arrived: tuple[Tensor, ...], held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Join what crossed cut 2 with what the front kept for the back."""
        return self.parts.back_inputs(arrived, held) if self.parts.kept else arrived

    def encoder(self, stream: str) -> StreamEncoder:
        """Make an encoder with fresh state for a stream of `common.spec.STREAMS`."""
        return StreamEncoder(self.codecs[stream], gradient=stream.endswith("grad"))

    async def settle(self, *, applied: bool) -> None:
        """End a step for training's codecs, each on its lane: they keep what they have learnt, or forget it."""
        for lane, stream in self._streams():
            if applied:
                await self.lanes.run(lane, "commit", stream.commit)
            else:
                await self.lanes.run(lane, "rollback", stream.rollback)

    def close(self) -> None:
        """End the lanes, and give up what codecs keep on disk."""
        self.lanes.close()
        for _, stream in self._streams():
            stream.close()

    def _streams(self) -> list[tuple[str, StreamEncoder | StreamDecoder]]:
        encoders, decoders = self.encoders.values(), self.decoders.values()
        return [*((ENCODE, stream) for stream in encoders), *((DECODE, stream) for stream in decoders)]

    def decoder(self, stream: str) -> StreamDecoder:
        """Make a decoder with fresh state for a stream of `common.spec.STREAMS`."""
        return StreamDecoder(self.codecs[stream], gradient=stream.endswith("grad"), max_bytes=self.max_bytes)


def build_context(job: Job, link: Link, lanes: Lanes, memory_format: str) -> Context:
    """Put front and back to work; the middle's memory is given up.

    Args:
        job: what was prepared.
        link: with the job open on it.
        lanes: compute, encode and decode threads.
        memory_format: the server's choice.
    """
    parts, spec = job.parts, job.spec
    parts.middle.free()

    def stage(part: str, needs_grad: list[bool]) -> Stage:
        return Stage(
            parts.partitions[part],
            part,
            seed=spec.seed,
            needs_grad=needs_grad,
            optim=spec.optim,
            memory_format=FORMATS[memory_format],
        )

    return Context(
        link=link,
        front=stage("front", [False for _ in parts.inputs]),
        back=stage("back", [info.requires_grad for info in (*parts.cut2, *parts.kept)]),
        parts=parts,
        codecs=dict(spec.codecs),
        lanes=lanes,
        seed=spec.seed,
        trim=job.samples.trim,
        max_bytes=max(info.dense_bytes(spec.chunk_size) for info in (*parts.cut1, *parts.cut2)),
        committed=committed_steps(*parts.partitions.values()),
    )
