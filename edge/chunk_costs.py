"""What a chunk of a training step costs, cut and compressed in one way or another: measured on this machine.

Front, middle, back and codecs are the ones of training and work on samples of the data set, here each by itself. What
crosses are the real activations and gradients, so their encoded sizes are real, too.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.cost import ChunkCost, Message
from common.graph import mode
from common.memory_format import FORMATS, choose_memory_format
from common.narrowing import LAST, narrow_to
from common.partition import Split
from common.runtime import set_threads
from common.stage import Stage
from edge.compress import Compression
from edge.config import TrainConfig
from edge.data.draws import epoch_order
from edge.opened import Opened, cut, fit_codecs
from wire.codecs.base import Facts
from wire.config import DEFAULT_LIMITS
from wire.serialize import encode
from wire.streams import StreamDecoder, StreamEncoder, chunk_message, facts_of

T = TypeVar("T")

STREAMS_OF = {"0F": "cut1.act", "1F": "cut2.act", "2T": "cut2.grad", "1B": "cut1.grad"}
"""The stream that the message after each kind of action belongs to."""

TEXTS = 4
"""Chunks of texts to measure; they differ in length, images do not."""

_BUDGET_S = 2.0  # of repeating a measurement: others may use the machine meanwhile
_MOST_ROUNDS = 8

Crossing = Mapping[str, Tensor]
"""The tensors of one message, by name."""


@dataclass(kw_only=True)
class _Ran:
    """Chunks that have gone through one way of cutting.

    Attributes:
        parts: of the model, as it was cut.
        seconds: of each kind of action, the mean of the chunks.
        messages: what crosses, by stream, chunk by chunk.
        facts: of each chunk.
        unmasked: by cut, the tensors that the mask says nothing of.
        costs: of the messages of a stream, by stream and codec chain.
    """

    parts: Split
    seconds: dict[str, float]
    messages: dict[str, list[Crossing]]
    facts: list[Facts]
    unmasked: dict[int, frozenset[str]]
    costs: dict[tuple[str, str], Message] = field(default_factory=dict)


class ChunkCosts:
    """Measures each way of cutting and compressing when it is first asked for; not thread-safe.

    Args:
        opened: the data and the model, which stays as it is.
        config: of the run that chunks like these are for.
    """

    def __init__(self, opened: Opened, config: TrainConfig) -> None:
        self._opened = opened
        self._config = config
        self._threads = set_threads(config.threads)
        self._format = config.memory_format
        size = config.chunk_size
        order = epoch_order(opened.samples.train_size, config.seed, 0)
        count = TEXTS if opened.spec.tokens is not None else 1
        self._ids = list(np.resize(order, (count, size)))
        self._inputs = [opened.samples.plain(ids) for ids in self._ids]
        self._labels = torch.zeros(size, dtype=torch.int64)
        self._ran: dict[tuple[tuple[str, str], tuple[str, str]], _Ran] = {}

    def cost(self, cuts: tuple[str, str], compression: Compression) -> ChunkCost:
        """Return what a chunk costs with all parts on this machine.

        Raises:
            UserError: a cut, bottleneck or codec does not fit.
        """
        key = cuts, compression.bottlenecks
        if key not in self._ran:
            parts = cut(self._opened, cuts, compression.bottlenecks, self._config)
            narrow_to(LAST, *parts.partitions.values())  # as most of training is, where it narrows at all
            self._ran[key] = self._measure(parts)
        ran = self._ran[key]
        codecs = fit_codecs(self._opened, ran.parts, compression, self._config).codecs
        return ChunkCost(
            seconds=ran.seconds,
            messages={
                kind: self._message(ran, stream, codecs[stream]) for kind, stream in STREAMS_OF.items()
            },
        )

    def dense_bytes(self, cuts: tuple[str, str]) -> int:
        """Return the bytes of a step that would cross as dense fp32, both ways, as ``dense_bytes`` in the metrics."""
        parts = next(ran.parts for (at, _), ran in self._ran.items() if at == cuts)
        return 2 * parts.dense_bytes(self._config.batch_size)

    def _measure(self, parts: Split) -> _Ran:
        set_threads(self._threads)
        if self._format == "auto":
            self._format = choose_memory_format(parts.middle, self._taken_by_middle(parts)).name
        stages = _Stages(parts, seed=self._config.seed, memory_format=self._format)
        try:
            # What is made once is made here, and not timed.
            runs = [stages.run(inputs, self._labels) for inputs in self._inputs]
            begun_s, rounds = time.perf_counter(), 0
            quickest = [dict.fromkeys(seconds, float("inf")) for seconds, _ in runs]
            while rounds < 1 or (rounds < _MOST_ROUNDS and time.perf_counter() - begun_s < _BUDGET_S):
                rounds += 1
                for inputs, best in zip(self._inputs, quickest, strict=True):
                    for kind, seconds in stages.run(inputs, self._labels)[0].items():
                        best[kind] = min(best[kind], seconds)
        finally:
            stages.close()
        crossing = [run for _, run in runs]
        return _Ran(
            parts=parts,
            seconds={kind: fmean(best[kind] for best in quickest) for kind in quickest[0]},
            messages={stream: [one[stream] for one in crossing] for stream in STREAMS_OF.values()},
            facts=[
                replace(facts_of(one["cut1.act"]), ids=tuple(ids.tolist()))
                for one, ids in zip(crossing, self._ids, strict=True)
            ],
            unmasked={cut: parts.unmasked(cut) for cut in (1, 2)},
        )

    def _taken_by_middle(self, parts: Split) -> tuple[Tensor, ...]:
        with torch.no_grad(), mode(parts.front, training=False):
            outputs: tuple[Tensor, ...] = parts.front(*self._inputs[0])
        return outputs[: len(parts.cut1)]

    def _message(self, ran: _Ran, stream: str, chain: str) -> Message:
        if (stream, chain) not in ran.costs:
            ran.costs[stream, chain] = self._encoded(ran, stream, chain)
        return ran.costs[stream, chain]

    def _encoded(self, ran: _Ran, stream: str, chain: str) -> Message:
        """Encode and decode a stream's messages on one thread, as training does; return their mean cost."""
        gradient, unmasked = stream.endswith("grad"), ran.unmasked[int(stream[3])]
        encoder = StreamEncoder(chain, gradient=gradient)
        decoder = StreamDecoder(chain, gradient=gradient, max_bytes=DEFAULT_LIMITS.max_payload)
        set_threads(1)
        try:
            costs = [
                self._there_and_back(encoder, decoder, crossing, facts, unmasked, gradient=gradient)
                for crossing, facts in zip(ran.messages[stream], ran.facts, strict=True)
            ]
        finally:
            set_threads(self._threads)
            encoder.close()
            decoder.close()
        size_bytes, encode_s, decode_s = map(fmean, zip(*costs, strict=True))
        return Message(size_bytes=round(size_bytes), encode_s=encode_s, decode_s=decode_s)

    def _there_and_back(
        self,
        encoder: StreamEncoder,
        decoder: StreamDecoder,
        crossing: Crossing,
        facts: Facts,
        unmasked: frozenset[str],
        *,
        gradient: bool,
    ) -> tuple[int, float, float]:
        """Send a message again and again; return its bytes in the end, and the quickest encoding and decoding."""
        encode_s = decode_s = float("inf")
        begun_s, rounds, size = time.perf_counter(), 0, 0
        while rounds < 2 or (rounds <= _MOST_ROUNDS and time.perf_counter() - begun_s < _BUDGET_S / 20):
            rounds += 1
            start_s = time.perf_counter()
            descs, buffers = encoder.encode(crossing, seed=rounds, facts=facts, unmasked=unmasked)
            encode_s = min(encode_s, time.perf_counter() - start_s)
            message = chunk_message((descs, buffers), list(crossing), 1, 0, backward=gradient)
            _, size = encode(message, DEFAULT_LIMITS)
            message = replace(message, payload=memoryview(b"".join(buffers)))
            start_s = time.perf_counter()
            # Both ends know the chunk by now; in training the first message says it itself.
            decoder.decode(message, message.names, facts=facts, unmasked=unmasked)
            decode_s = min(decode_s, time.perf_counter() - start_s)
            encoder.commit()
            decoder.commit()
        return size, encode_s, decode_s


class _Stages:
    """Front, middle and back of a model on this machine, for chunks that train nothing."""

    def __init__(self, parts: Split, *, seed: int, memory_format: str) -> None:
        self._parts = parts
        needs_grad = {
            "front": [False for _ in parts.inputs],
            "middle": [info.requires_grad for info in parts.cut1],
            "back": [info.requires_grad for info in (*parts.cut2, *parts.kept)],
        }
        self._stages = {
            name: Stage(
                parts.partitions[name],
                name,
                seed=seed,
                needs_grad=needed,
                memory_format=FORMATS[memory_format],
            )
            for name, needed in needs_grad.items()
        }
        for stage in self._stages.values():
            stage.begin_step()

    def run(
        self, inputs: tuple[Tensor, ...], labels: Tensor
    ) -> tuple[dict[str, float], dict[str, dict[str, Tensor]]]:
        """Run a chunk forward and backward; return the seconds of each kind of action, and what crosses by stream."""
        parts, first, second = self._parts, len(self._parts.cut1), len(self._parts.cut2)
        front, middle, back = (self._stages[name] for name in ("front", "middle", "back"))
        seconds: dict[str, float] = {}

        def timed(kind: str, work: Callable[..., T], *args: Any) -> T:
            start_s = time.perf_counter()
            result = work(*args)
            seconds[kind] = time.perf_counter() - start_s
            return result

        def turn(arrived: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
            entries, outputs = back.forward_attached(1, 0, arrived)
            with torch.enable_grad():
                loss = cross_entropy(outputs[0], labels)
            return back.backward_attached(entries, (loss,), (None,))

        made = timed("0F", front.forward, 1, 0, inputs)
        through = timed("1F", middle.forward, 1, 0, made[:first])
        of_back = timed("2T", turn, parts.back_inputs(through, made))
        of_middle = timed("1B", middle.backward, 0, of_back[:second])
        timed("0B", front.backward, 0, parts.front_gradients(of_middle, of_back))
        crossing = {
            "cut1.act": _named(parts.cut1, made[:first]),
            "cut2.act": _named(parts.cut2, through),
            "cut2.grad": _named(parts.cut2, of_back[:second]),
            "cut1.grad": _named(parts.cut1, of_middle),
        }
        return seconds, crossing

    def close(self) -> None:
        """Leave the model as it was: its statistics, and no gradients."""
        for stage in self._stages.values():
            stage.rollback()


def _named(infos: Any, tensors: Any) -> dict[str, Tensor]:
    return {info.name: tensor for info, tensor in zip(infos, tensors, strict=True) if tensor is not None}
