"""What should go first where more than one action is ready: the schedule's rule against PipeDream's, in simulation.

    python -m benchmarks.schedule_order [--steps N]

Random steps of 8 chunks, over links from 10 Mbit/s to 1 Gbit/s with up to 50 ms one way, whose actions take from 3 to
160 ms and vary from chunk to chunk as they do on busy machines (each up to its own time again, 20 % more on average).
Either rule runs at the same depth, so that it may hold the same memory, with the best lead for it. What is printed is
simulated time over the floor, mean and worst, by what gives the floor.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from common.cost import ChunkCost, Link, Message, StepModel
from common.floor import floor
from common.schedule import WAIT, Action, Schedule
from common.simulator import simulate
from edge.flops import columns

CHUNKS = 8
DEPTHS = (2, 3, 4, 6, 8)
LEADS = (0, 1, 2)
DELAYS_S = (0.0, 0.005, 0.02, 0.05)
BACKWARD_FIRST = (("0B", "2T", "0F"), ("1B", "1F"))
OURS = (("2T", "0F", "0B"), ("1F", "1B"))


def ordered(kinds: Sequence[str], waiting: Collection[str], first: str, last: str, depth: int) -> Schedule:
    """A side's schedule, as those of `common.schedule`, that prefers kinds of actions in this order."""
    done = dict.fromkeys(kinds, 0)
    arrived: dict[str, set[int]] = {kind: set() for kind in waiting}

    def ready(kind: str) -> bool:
        chunk = done[kind]
        if chunk == CHUNKS:
            return False
        return chunk in arrived[kind] if kind in arrived else done[first] - done[last] < depth

    while done[last] < CHUNKS:
        kind = next(filter(ready, kinds), None)
        for arrival in (yield WAIT if kind is None else Action(int(kind[0]), kind[1], done[kind])) or ():
            arrived[arrival.kind].add(arrival.chunk)
        if kind is not None:
            done[kind] += 1


def best_s(model: StepModel, depth: int, order: tuple[Sequence[str], Sequence[str]]) -> float:
    """Seconds of a simulated step in this order of the edge's and the cloud's actions, with the best lead."""
    edge, cloud = order
    return min(
        simulate(
            model,
            depth,
            lead=lead,
            edge=ordered(edge, ("2T", "0B"), "0F", "0B", depth),
            cloud=ordered(cloud, ("1F", "1B"), "1F", "1B", CHUNKS),
        ).makespan_s
        for lead in LEADS
    )


def random_step(rng: random.Random) -> StepModel:
    """A step that some edge, cloud and link might take."""
    front, turn, middle = (10 ** rng.uniform(-2.5, most) for most in (-1.0, -1.3, -0.8))
    means = {"0F": front, "1F": middle, "2T": turn, "1B": 1.7 * middle, "0B": 1.5 * front}
    sizes = [round(10 ** rng.uniform(4.5, most)) for most in (7.0, 6.5)]
    messages = {
        kind: Message(size_bytes=sizes[cut], encode_s=5e-4, decode_s=5e-4)
        for kind, cut in (("0F", 0), ("1F", 1), ("2T", 1), ("1B", 0))
    }

    def varied(seconds: Mapping[str, float]) -> dict[str, float]:
        return {kind: mean * (1 + min(1.0, 0.2 * rng.expovariate(1.0))) for kind, mean in seconds.items()}

    chunks = tuple(ChunkCost(seconds=varied(means), messages=messages) for _ in range(CHUNKS))
    rate, delay_s = 10 ** rng.uniform(7, 9), rng.choice(DELAYS_S)
    link = Link(up_bit_s=rate, down_bit_s=rate, delay_s=delay_s)
    return StepModel(chunks=chunks, link=link, shared_cores=rng.random() < 0.4, update_s=0.01)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; return 0 where this schedule is on average no slower, whatever gives the floor."""
    parser = argparse.ArgumentParser(prog="benchmarks/schedule_order.py", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="random steps to simulate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="20 steps; proves little")
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    over: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(20 if options.quick else options.steps):
        model = random_step(rng)
        ideal = floor(model)
        for depth in DEPTHS:
            usual, ours = (best_s(model, depth, order) / ideal.total_s for order in (BACKWARD_FIRST, OURS))
            over[ideal.bound_by][depth].append((usual, ours))
    lines = [("bound by", "depth", "steps", "backward first", "worst", "this schedule", "worst", "ratio", "")]
    met = True
    for bound_by, by_depth in sorted(over.items()):
        good = _ratio([pair for pairs in by_depth.values() for pair in pairs]) <= 1.0
        met &= good
        for depth, pairs in by_depth.items():
            means = [
                f"{cell:.3f}"
                for rule in zip(*pairs, strict=True)
                for cell in (statistics.fmean(rule), max(rule))
            ]
            verdict = "" if depth != DEPTHS[-1] else "pass" if good else "FAIL"
            lines.append((bound_by, str(depth), str(len(pairs)), *means, f"{_ratio(pairs):.3f}", verdict))
    print(f"{columns(lines)}\ntime over the floor; target: no slower on average over the depths")
    return 0 if met else 1


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.fmean(ours / usual for usual, ours in pairs)


if __name__ == "__main__":
    sys.exit(main())
