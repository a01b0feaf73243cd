"""How many chunks to keep in flight, and what goes first on the link, chosen from what the first steps took.

Too few leave the link idle while chunks travel; each one more holds its activations in memory on both sides.
The schedule's simulator says, from measured costs, how few are enough. The choice changes no result.
"""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from common.cost import ANSWERS, CLOUD, DOWN, EDGE, UP, ChunkCost, Message, StepModel
from common.cost import Link as LinkCost
from common.lanes import COMPUTE, DECODE, ENCODE, Lanes
from common.plan import Plan, best_plan
from edge.busy import BusyTimes, number
from edge.link import Link

MEASURED_STEPS = (2, 3, 4)
"""Steps after which to choose; the first one pays for what is made once."""

FIRST_DEPTH = 4
"""Chunks in flight until the first choice."""

QUEUE_S = 0.05
"""How long what is sent waits behind what is already on a link that is always busy."""

LATE_SHARE = 0.15
"""By what share of the longest action a message comes late at times: no two actions take exactly the same."""

Means = Mapping[str, Mapping[str, float]]
"""Mean seconds by lane (`compute`, `encode`, `decode`) and kind of action."""


class Tuner:
    """Chooses the plan of each step.

    Args:
        chunks: chunks a step.
        depth: the depth to use instead of choosing one, or None.

    Attributes:
        plan: what to do now.
    """

    def __init__(self, chunks: int, depth: int | None) -> None:
        self._chunks = chunks
        self._depth = depth if depth is None else min(chunks, depth)
        self._steps = 0
        self._quickest_s: dict[str, float] = {}
        self.plan = Plan(min(chunks, FIRST_DEPTH) if self._depth is None else self._depth)

    @property
    def wants_measurements(self) -> bool:
        """Whether the step just made is one to measure."""
        return self._steps in MEASURED_STEPS

    def stepped(self) -> None:
        """A step was made."""
        self._steps += 1

    async def tune(self, lanes: Lanes, link: Link, busy: BusyTimes) -> None:
        """Take note of a step that was made, and choose anew where it was one to measure.

        Args:
            lanes: of the edge.
            link: that it was made over; is told what goes first.
            busy: knows what the cloud says of the step.

        Raises:
            WireError: the link failed.
        """
        self.stepped()
        edge, sizes = lanes.take_means(), link.sent.take_sizes()
        if not self.wants_measurements:
            return
        await link.confirmed()
        model = measured_model(
            chunks=self._chunks,
            edge=edge,
            cloud=busy.cloud_detail,
            sizes=sizes,
            up_bit_s=link.sent.rate_bit_s,
            rtt_s=link.connection.rtt_s or 0.0,
            shared_cores=link.shares_cores,
        )
        plan = await asyncio.to_thread(self.choose, model)
        link.connection.lead(plan.lead)

    def choose(self, model: StepModel) -> Plan:
        """Choose anew, now that a step was measured; takes up to a second.

        Of each kind of work the quickest measurement counts: whatever else runs on a machine only adds to it.

        Args:
            model: what that step cost, the same for every chunk.
        """
        for kind, seconds in model.chunks[0].seconds.items():
            self._quickest_s[kind] = min(seconds, self._quickest_s.get(kind, seconds))
        cost = replace(model.chunks[0], seconds=dict(self._quickest_s))
        model = replace(model, chunks=(cost,) * len(model.chunks))
        self.plan = best_plan(model, depth=self._depth)
        return self.plan


def measured_model(
    *,
    chunks: int,
    edge: Means,
    cloud: Mapping[str, Any],
    sizes: Mapping[str, float],
    up_bit_s: float,
    rtt_s: float,
    shared_cores: bool,
) -> StepModel:
    """Build the simulator's model of a step from what was measured.

    Args:
        chunks: chunks a step.
        edge: the edge's means.
        cloud: what the cloud says of its step: `mean_s`, `sizes` and `rate_bit_s`.
        sizes: mean bytes of a message of the edge's, by the kind of action that it follows.
        up_bit_s: what the link has taken from the edge, in bit/s.
        rtt_s: round-trip time of the link.
        shared_cores: whether both sides compute on the same machine.
    """

    def seconds(means: object, lane: str, kind: str) -> float:
        of_lane = means.get(lane) if isinstance(means, Mapping) else None
        return number(of_lane.get(kind)) if isinstance(of_lane, Mapping) else 0.0

    def message(kind: str) -> Message:
        of_cloud = kind[0] == "1"
        sender, receiver = (cloud_means, edge) if of_cloud else (edge, cloud_means)
        of_sender = cloud.get("sizes") if of_cloud else sizes
        return Message(
            size_bytes=round(number(of_sender.get(kind))) if isinstance(of_sender, Mapping) else 0,
            encode_s=seconds(sender, ENCODE, kind),
            decode_s=seconds(receiver, DECODE, ANSWERS[kind]),
        )

    cloud_means = cloud.get("mean_s")
    up_bit_s, down_bit_s = _rate(up_bit_s), _rate(number(cloud.get("rate_bit_s")))
    cost = ChunkCost(
        seconds={
            **{kind: seconds(edge, COMPUTE, kind) for kind in EDGE},
            **{kind: seconds(cloud_means, COMPUTE, kind) for kind in CLOUD},
        },
        messages={kind: message(kind) for kind in ANSWERS},
    )
    link = LinkCost(up_bit_s=up_bit_s, down_bit_s=down_bit_s, delay_s=max(rtt_s, 0.0) / 2)
    return StepModel.even(cost, chunks, late(link, cost), shared_cores=shared_cores)


def late(link: LinkCost, cost: ChunkCost) -> LinkCost:
    """Add to a link's delay what keeps chunks like these waiting besides.

    A busy link delays by what it holds in queues, those of the kernel and of the network, and no two actions take
    exactly the same.
    """
    link_s = max(cost.size_bytes(UP) * 8 / link.up_bit_s, cost.size_bytes(DOWN) * 8 / link.down_bit_s)
    share = link_s / max(link_s, cost.compute_s(EDGE), cost.compute_s(CLOUD), 1e-9)
    return replace(link, delay_s=link.delay_s + QUEUE_S * share + LATE_SHARE * max(cost.seconds.values()))


def _rate(bit_s: float) -> float:
    """Return a rate that can be calculated with: nothing measured means nothing that bounds."""
    return bit_s if math.isfinite(bit_s) and bit_s >= 1 else 1e15
