"""What a server and the link to it are like, found by a few training steps that lead to nothing."""

import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from common.cost import ANSWERS, CLOUD, DOWN, EDGE, UP, ChunkCost, Link, Message
from common.lanes import COMPUTE, DECODE, ENCODE
from common.trace import Tracer
from edge.busy import number
from edge.chunk_costs import ChunkCosts
from edge.compress import parse_compress
from edge.config import TrainConfig, parse_address
from edge.link import open_link
from edge.opened import RANDOM, Opened
from edge.progress import SilentProgress
from edge.security import wire_config
from edge.speeds import Speeds
from edge.trainer import Trainer
from wire.errors import RemoteProtocolError

LIGHT = "int2"
"""What the first steps are compressed with: hardly any bytes, and a model whose middle the server makes by itself."""

HEAVY = ("none", "int8")
"""What the others are compressed with, which measure the link: the first whose step does not take too long."""

MOST_S = 4.0
"""How long one step may take that measures the link."""

_CHUNKS, _STEPS = 2, 4
_LOOKS, _LOOK_S, _PINGS = 100, 0.05, 8
_LEAST_LR = 1e-9
_LEAST_S = 1e-6  # what clocks are apart may make a way look shorter than none


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a server is.

    Attributes:
        delay_s: one-way delay of the link to it.
        shared_cores: it computes on this machine's cores.
    """

    delay_s: float
    shared_cores: bool


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
        for _ in range(_LOOKS):
            await asyncio.sleep(_LOOK_S)
            if link.connection.rtt_s is not None:
                break
        # The first pings go one after the other; the quickest of them counts.
        await asyncio.sleep(_PINGS * (link.connection.rtt_s or 0.0))
        return Place(delay_s=(link.connection.rtt_s or 0.0) / 2, shared_cores=link.shares_cores)


async def probe(
    config: TrainConfig,
    opened: Opened,
    costs: ChunkCosts,
    place: Place,
    *,
    link: Link | None = None,
) -> Surroundings:
    """Measure a server and the link to it.

    Args:
        config: of the run that is to be planned.
        opened: its data and its model; the server makes one with random weights.
        costs: of the model on this machine.
        place: where the server is.
        link: one to assume in place of the one there is, which is not measured then.

    Raises:
        UserError: the server refuses what the settings say.
        WireError: it cannot be reached, or the link failed.
    """
    local = await asyncio.to_thread(costs.cost, opened.cuts, parse_compress((LIGHT,)))
    steps = await _steps(config, opened, LIGHT, place.delay_s)
    around = Surroundings(
        link=link or steps.link,
        speeds=Speeds.between(steps.cost, local),
        shared_cores=place.shared_cores,
    )
    if link is not None:
        return around
    for heavy in HEAVY:
        dense = await asyncio.to_thread(costs.cost, opened.cuts, parse_compress((heavy,)))
        more = dense.size_bytes(ANSWERS) / max(1, steps.cost.size_bytes(ANSWERS))
        if _CHUNKS * steps.moving_s * more <= MOST_S:
            heavier = await _steps(config, opened, heavy, place.delay_s)
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
            spans: as in Chrome's trace format, times in microseconds; what the server says is among them.
            delay_s: one-way delay of the link.

        Raises:
            RemoteProtocolError: the server says nothing of a message.
        """
        sides = {span["pid"]: span["args"]["name"] for span in spans if _names_side(span)}
        found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for span in spans:
            if span["ph"] == "X":
                found[sides[span["pid"]], span["cat"], span["name"]].append(span)

        def of(kind: str, side: str, lane: str) -> list[list[Mapping[str, Any]]]:
            """The spans of a kind: of each chunk those of the steps."""
            return [found.get((side, lane, f"{kind}{chunk}"), [])[1:] for chunk in range(_CHUNKS)]

        def lasted_s(kind: str, side: str, lane: str) -> float:
            durations = [span["dur"] for chunk in of(kind, side, lane) for span in chunk]
            return median(durations) / 1e6 if durations else 0.0

        messages, moving_s = {}, {}
        for kind, then in ANSWERS.items():
            sender, receiver = ("edge", "cloud") if kind in UP else ("cloud", "edge")
            sent, arrived = of(kind, sender, "send"), of(then, receiver, DECODE)
            ways_s = [
                (end["ts"] - start["ts"]) / 1e6
                for starts, ends in zip(sent, arrived, strict=True)
                for start, end in zip(starts, ends, strict=False)
            ]
            if not ways_s:
                raise RemoteProtocolError(f"the server's timeline lacks what came of {kind}")
            size = fmean(number(span["args"].get("bytes")) for chunk in sent for span in chunk)
            moving_s[kind] = max(median(ways_s) - delay_s, _LEAST_S)
            messages[kind] = Message(
                size_bytes=round(size),
                encode_s=lasted_s(kind, sender, ENCODE),
                decode_s=lasted_s(then, receiver, DECODE),
            )
        cost = ChunkCost(
            seconds={
                kind: lasted_s(kind, side, COMPUTE)
                for side, kinds in (("edge", EDGE), ("cloud", CLOUD))
                for kind in kinds
            },
            messages=messages,
        )
        up_bit_s, down_bit_s = (
            max(cost.size_bytes(kinds), 1) * 8 / sum(moving_s[kind] for kind in kinds) for kinds in (UP, DOWN)
        )
        return cls(
            cost=cost,
            link=Link(up_bit_s=up_bit_s, down_bit_s=down_bit_s, delay_s=delay_s),
            moving_s=sum(moving_s.values()),
        )


async def _steps(config: TrainConfig, opened: Opened, spec: str, delay_s: float) -> Steps:
    """Train a few steps with one chunk in flight, so that nothing waits for anything else, not for a core either."""
    batch = _CHUNKS * config.chunk_size
    whole = opened.samples.train_size // batch * batch
    with TemporaryDirectory(prefix="isthmus-") as folder:
        timeline = Path(folder, "timeline.json")
        steps = replace(
            config,
            # Nothing is to be learnt: the server makes such weights, and steps like these end no run.
            weights=RANDOM,
            lr=_LEAST_LR,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.0,
            # The first steps in fp16 overflow, and are not told of.
            amp="bf16" if config.amp == "fp16" else config.amp,
            cuts=opened.cuts,
            image_size=opened.spec.image_size,  # weights with a name may have one of their own
            compress=(spec,),
            bottleneck=None,
            batch_size=batch,
            train_limit=whole or None,  # no batch is smaller than the others
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


def _names_side(span: Mapping[str, Any]) -> bool:
    return bool(span["ph"] == "M" and span["name"] == "process_name")
