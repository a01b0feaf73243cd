"""What a server and the link to it are like, found by a few training steps that lead to nothing."""

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from common.cost import ChunkCost, Link, Message
from common.errors import UserError
from common.lanes import COMPUTE, DECODE, ENCODE
from common.trace import Tracer
from edge.chunk_costs import ChunkCosts
from edge.compress import parse_compress
from edge.config import TrainConfig, parse_address
from edge.link import open_link
from edge.opened import RANDOM
from edge.progress import SilentProgress
from edge.security import wire_config
from edge.trainer import Trainer
from edge.tuner import ANSWERS

LIGHT = ("conv+int8", "int8")
"""What the first steps are compressed with: the first that suits what crosses."""

HEAVY = ("none", "int8")
"""What the others are compressed with, which measure the link: the first whose step does not take too long."""

MOST_S = 4.0
"""How long one step may take that measures the link."""

_CHUNKS, _STEPS = 2, 4
_LOOKS, _LOOK_S = 100, 0.05
_LEAST_S = 1e-6  # what clocks are apart may make a way look shorter than none
_EDGE, _CLOUD = ("0F", "2T", "0B"), ("1F", "1B")
_UP, _DOWN = ("0F", "2T"), ("1F", "1B")


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """How long work takes where it belongs, over what it takes on this machine with nothing else to do.

    Attributes:
        edge: computing on the edge.
        cloud: computing on the cloud.
        edge_codecs: encoding and decoding on the edge.
        cloud_codecs: the same on the cloud.
    """

    edge: float = 1.0
    cloud: float = 1.0
    edge_codecs: float = 1.0
    cloud_codecs: float = 1.0

    def scaled(self, cost: ChunkCost) -> ChunkCost:
        """Return the cost of a chunk that was measured with all parts on this machine."""
        return ChunkCost(
            seconds={
                kind: seconds * (self.cloud if kind in _CLOUD else self.edge)
                for kind, seconds in cost.seconds.items()
            },
            messages={
                kind: replace(
                    message,
                    encode_s=message.encode_s * (self.edge_codecs if kind in _UP else self.cloud_codecs),
                    decode_s=message.decode_s * (self.cloud_codecs if kind in _UP else self.edge_codecs),
                )
                for kind, message in cost.messages.items()
            },
        )

    @classmethod
    def between(cls, cost: ChunkCost, local: ChunkCost) -> "Speeds":
        """Compare what a chunk cost with what the same one costs on this machine alone."""
        return cls(
            edge=_share(_seconds(cost, _EDGE), _seconds(local, _EDGE)),
            cloud=_share(_seconds(cost, _CLOUD), _seconds(local, _CLOUD)),
            edge_codecs=_share(_codecs(cost, _UP, _DOWN), _codecs(local, _UP, _DOWN)),
            cloud_codecs=_share(_codecs(cost, _DOWN, _UP), _codecs(local, _DOWN, _UP)),
        )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a server is.

    Attributes:
        delay_s: one-way delay of the link to it.
        is_local: it runs on this very machine.
    """

    delay_s: float
    is_local: bool


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a plan is for.

    Attributes:
        link: its rates and its delay, as measured or as assumed.
        speeds: of both sides.
        shared_cores: both sides compute on this machine.
    """

    link: Link
    speeds: Speeds
    shared_cores: bool = False


async def greet(config: TrainConfig) -> Place:
    """Connect to the server and leave, so that what is wrong with it shows before anything is measured.

    Raises:
        UserError: the settings of the connection do not go together.
        WireError: the server cannot be reached, or turns this client away.
    """
    address, tracer = parse_address(config.server), Tracer("edge", enabled=False)
    async with open_link(*address, tracer, wire_config(config)) as link:
        for _ in range(_LOOKS):  # until the server has answered the first pings
            await asyncio.sleep(_LOOK_S)
            if link.connection.rtt_s is not None:
                break
        return Place(delay_s=(link.connection.rtt_s or 0.0) / 2, is_local=link.is_local)


async def probe(
    config: TrainConfig,
    costs: ChunkCosts,
    cuts: tuple[str, str],
    place: Place,
    *,
    link: Link | None = None,
) -> Surroundings:
    """Measure a server and the link to it.

    Args:
        config: of the run that is to be planned; the server builds its model, with random weights.
        costs: of the same model on this machine.
        cuts: of the run.
        place: where the server is.
        link: one to assume in place of the one there is, which is not measured then.

    Raises:
        UserError: the server refuses what the settings say.
        WireError: it cannot be reached, or the link failed.
    """
    light, local = _lightest(costs, cuts)
    steps = await _steps(config, cuts, light, place.delay_s)
    around = Surroundings(
        link=link or steps.link,
        speeds=Speeds.between(steps.cost, local),
        shared_cores=place.is_local,
    )
    if link is not None:
        return around
    for heavy in HEAVY:
        more = _bytes(costs.cost(cuts, parse_compress((heavy,)))) / max(1, _bytes(steps.cost))
        if heavy != light and _CHUNKS * steps.moving_s * more <= MOST_S:
            heavier = await _steps(config, cuts, heavy, place.delay_s)
            return replace(around, link=heavier.link)
    return around


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What a few steps came to, of chunks that were alone on their way.

    Attributes:
        cost: of a chunk, its times the medians.
        link: what carried them.
        moving_s: how long the messages of a chunk were on their way, without the link's delay.
    """

    cost: ChunkCost
    link: Link
    moving_s: float

    @classmethod
    def of_timeline(cls, spans: Sequence[Mapping[str, Any]], delay_s: float) -> "Steps":
        """Take a timeline apart; its first step is left out, which pays for what is made once.

        Args:
            spans: as in Chrome's trace format, times in microseconds.
            delay_s: one-way delay of the link.
        """
        sides = {span["pid"]: span["args"]["name"] for span in spans if span["name"] == "process_name"}
        found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for span in spans:
            if span["ph"] == "X":
                found[sides[span["pid"]], span["cat"], span["name"]].append(span)

        def of(kind: str, side: str, lane: str) -> list[Mapping[str, Any]]:
            """All spans of a kind, chunk by chunk and step by step."""
            chunks = (found.get((side, lane, f"{kind}{chunk}"), [])[1:] for chunk in range(_CHUNKS))
            return [span for steps in chunks for span in steps]

        def lasted_s(kind: str, side: str, lane: str) -> float:
            spans = of(kind, side, lane)
            return median(span["dur"] for span in spans) / 1e6 if spans else 0.0

        messages, moving_s, rates = {}, {}, {}
        for kind, then in ANSWERS.items():
            sender, receiver = ("edge", "cloud") if kind in _UP else ("cloud", "edge")
            sent, arrived = of(kind, sender, "send"), of(then, receiver, DECODE)
            size = fmean(span["args"]["bytes"] for span in sent)
            ways_s = [(end["ts"] - start["ts"]) / 1e6 for start, end in zip(sent, arrived, strict=False)]
            moving_s[kind] = max(median(ways_s) - delay_s, _LEAST_S)
            messages[kind] = Message(
                size_bytes=round(size),
                encode_s=lasted_s(kind, sender, ENCODE),
                decode_s=lasted_s(then, receiver, DECODE),
            )
        for kinds in (_UP, _DOWN):
            carried = sum(messages[kind].size_bytes for kind in kinds)
            rates[kinds] = carried * 8 / sum(moving_s[kind] for kind in kinds)
        return cls(
            cost=ChunkCost(
                seconds={
                    kind: lasted_s(kind, "cloud" if kind in _CLOUD else "edge", COMPUTE)
                    for kind in (*_EDGE, *_CLOUD)
                },
                messages=messages,
            ),
            link=Link(up_bit_s=rates[_UP], down_bit_s=rates[_DOWN], delay_s=delay_s),
            moving_s=sum(moving_s.values()),
        )


def _lightest(costs: ChunkCosts, cuts: tuple[str, str]) -> tuple[str, ChunkCost]:
    *others, last = LIGHT
    for spec in others:
        try:
            return spec, costs.cost(cuts, parse_compress((spec,)))
        except UserError:
            continue  # such as a convolution for tokens
    return last, costs.cost(cuts, parse_compress((last,)))


async def _steps(config: TrainConfig, cuts: tuple[str, str], spec: str, delay_s: float) -> Steps:
    """Train a few steps with one chunk in flight, so that nothing waits for anything else, not for a core either."""
    size = -(-config.batch_size // config.chunks)
    with TemporaryDirectory(prefix="isthmus-") as folder:
        timeline = Path(folder, "timeline.json")
        steps = replace(
            config,
            weights=RANDOM,  # nothing is learnt, and the server can make them
            cuts=cuts,
            compress=(spec,),
            bottleneck=None,
            batch_size=_CHUNKS * size,
            chunks=_CHUNKS,
            depth=1,
            steps=_STEPS,
            eval_every=0,
            save=None,
            checkpoint=None,
            metrics=None,
            trace=timeline,
            give_up_after=60.0,
        )
        await Trainer(steps, SilentProgress()).run()
        events = await asyncio.to_thread(_events, timeline)
    return Steps.of_timeline(events, delay_s)


def _events(timeline: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(timeline.read_text())["traceEvents"]
    return events


def _share(seconds: float, of: float) -> float:
    return seconds / of if seconds > 0 and of > 0 else 1.0


def _seconds(cost: ChunkCost, kinds: Iterable[str]) -> float:
    return sum(cost.seconds.get(kind, 0.0) for kind in kinds)


def _codecs(cost: ChunkCost, sent: Iterable[str], received: Iterable[str]) -> float:
    """Sum the seconds that one side encodes and decodes."""
    encode_s = sum(cost.messages[kind].encode_s for kind in sent)
    return encode_s + sum(cost.messages[kind].decode_s for kind in received)


def _bytes(cost: ChunkCost) -> int:
    return sum(message.size_bytes for message in cost.messages.values())
