"""What should go first where more than one action is ready: the schedule's rule against PipeDream's, in simulation.

    python -m benchmarks.schedule_order [--steps N]

Random steps of 8 chunks, over links from 10 Mbit/s to 1 Gbit/s with up to 50 ms one way, whose actions take from 3 to
270 ms and vary from chunk to chunk as they do on busy machines (20 % more on average, twice as long at most). Either
rule runs at the same depth, the most chunks that may be in flight, with the best lead for it. What is printed is
simulated time over the floor, mean and worst, by what gives the floor, and the most chunks in flight, on average.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from common.cost import ChunkCost, Link, Message, StepModel
from common.floor import floor
from common.schedule import CLOUD, EDGE, schedule_of
from common.simulator import simulate
from common.timeline import Timeline
from edge.flops import columns

CHUNKS = 8
DEPTHS = (2, 3, 4, 6, 8)
LEADS = (0, 1, 2)
DELAYS_S = (0.0, 0.005, 0.02, 0.05)


def usual(model: StepModel, depth: int, lead: int) -> Timeline:
    """A step in PipeDream's order."""
    edge = schedule_of(replace(EDGE, kinds=("0B", "2T", "0F")), CHUNKS, depth)
    cloud = schedule_of(replace(CLOUD, kinds=("1B", "1F")), CHUNKS, CHUNKS)
    return simulate(model, depth, lead=lead, edge=edge, cloud=cloud)


def ours(model: StepModel, depth: int, lead: int) -> Timeline:
    """A step in the schedule's own order."""
    return simulate(model, depth, lead=lead)


def best(model: StepModel, depth: int, run: Callable[[StepModel, int, int], Timeline]) -> Timeline:
    """The quickest over the leads."""
    return min((run(model, depth, lead) for lead in LEADS), key=lambda timeline: timeline.makespan_s)


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
    over: dict[str, dict[int, list[tuple[Timeline, Timeline, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for _ in range(20 if options.quick else options.steps):
        model = random_step(rng)
        ideal = floor(model)
        for depth in DEPTHS:
            pair = best(model, depth, usual), best(model, depth, ours)
            over[ideal.bound_by][depth].append((*pair, ideal.total_s))
    head = ("bound by", "depth", "steps", "backward first", "worst", "in flight")
    lines = [(*head, "this schedule", "worst", "in flight", "ratio", "")]
    met = True
    for bound_by, by_depth in sorted(over.items()):
        good = ratio([run for runs in by_depth.values() for run in runs]) <= 1.0
        met &= good
        for depth, runs in by_depth.items():
            cells = []
            for rule in (0, 1):
                times = [run[rule].makespan_s / run[2] for run in runs]
                in_flight = statistics.fmean(run[rule].max_in_flight for run in runs)
                cells += [f"{statistics.fmean(times):.3f}", f"{max(times):.3f}", f"{in_flight:.1f}"]
            verdict = "" if depth != DEPTHS[-1] else "pass" if good else "FAIL"
            lines.append((bound_by, str(depth), str(len(runs)), *cells, f"{ratio(runs):.3f}", verdict))
    print(f"{columns(lines)}\ntime over the floor; target: no slower on average over the depths")
    return 0 if met else 1


def ratio(runs: Sequence[tuple[Timeline, Timeline, float]]) -> float:
    """How much longer a step takes in the schedule's order than in PipeDream's, on average."""
    return statistics.fmean(mine.makespan_s / theirs.makespan_s for theirs, mine, _ in runs)


if __name__ == "__main__":
    sys.exit(main())
