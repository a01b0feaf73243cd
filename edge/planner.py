"""The command ``edge-client plan``: where to cut a model and what to compress, on this machine, link and server.

    samples → parts and codecs timed here ─┐
    a few steps with the server ───────────┴─▶ each way to cut and compress, simulated ─▶ the mildest that is fast

Times are those of training itself: of the same parts, codecs, schedule and plan of what is in flight.
"""

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from common import text_config
from common.cost import CLOUD, DOWN, EDGE, UP, ChunkCost, Link, StepModel
from common.cut_choice import first_cuts, second_cuts
from common.errors import UserError
from common.exported import export_modes
from common.floor import floor
from common.flops import profile
from common.graph import find_cut, trace
from common.plan import best_plan
from common.simulator import simulate
from edge.chunk_costs import ChunkCosts
from edge.compress import Compression, check_repetition, parse_compress
from edge.config import TrainConfig
from edge.opened import Opened, open_model
from edge.plan_report import PlanReport, Row, mildest
from edge.probe import Place, Surroundings, greet, probe
from edge.speeds import Speeds
from edge.tuner import late
from wire.transport import run

__all__ = ["LADDERS", "PlanConfig", "Planner", "make_plan", "plan_command"]

Note = Callable[[str], None]

LADDERS = {
    "images": ("none", "fp16", "int8", "conv+int8", "conv2+int8"),
    "text": ("none", "fp16", "int8", "int4:hadamard"),
}
"""What is compared unless something is named, what loses least first."""

WORTH_MOVING = 0.95
"""The most that a step may take with other cuts, of what it takes with the usual ones, for them to be named."""

_ROUGH_DEPTH = 8


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What to plan.

    Attributes:
        training: the run; its ``compress`` does not matter.
        candidates: what to compare, each the values of ``--compress`` with spaces between; empty for `LADDERS`.
        asks_server: measure the server, and the link where none is assumed.
        rate_mbit_s: the link's rate to assume, in Mbit/s.
        delay_ms: its one-way delay to assume, in ms; with a rate only, 0 unless given.
        cloud_speed: how many times as fast as this machine the cloud computes, where no server is asked.
        moves_cuts: try other cuts where none are given.
        json: print one JSON object instead of tables.
    """

    training: TrainConfig
    candidates: tuple[str, ...] = ()
    asks_server: bool = True
    rate_mbit_s: float | None = None
    delay_ms: float | None = None
    cloud_speed: float | None = None
    moves_cuts: bool = True
    json: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without data, model or server.

        Raises:
            UserError: what is wrong, and what would be right.
        """
        if self.asks_server and self.cloud_speed is not None:
            raise UserError(
                "--cloud-speed is for a plan without a server, and --server is measured; give one"
            )
        if not self.asks_server and self.rate_mbit_s is None:
            raise UserError(
                "say where the server is, to measure it: --server HOST:PORT; or what to assume: --rate MBIT/S "
                "and --cloud-speed TIMES"
            )
        if self.rate_mbit_s is None and self.delay_ms is not None:
            raise UserError("--delay comes with --rate; without it both are measured")
        for name, value, least in (
            ("rate", self.rate_mbit_s, 1e-3),
            ("delay", self.delay_ms, 0),
            ("cloud-speed", self.cloud_speed, 1e-6),
        ):
            if value is not None and not least <= value <= 1e9:
                raise UserError(f"--{name} must be from {least:g} to 1e9, not {value:g}")

    @property
    def link(self) -> Link | None:
        """The link to assume; None to measure it."""
        if self.rate_mbit_s is None:
            return None
        rate_bit_s = self.rate_mbit_s * 1e6
        return Link(up_bit_s=rate_bit_s, down_bit_s=rate_bit_s, delay_s=(self.delay_ms or 0.0) / 1e3)


class Planner:
    """Says how long steps take, by simulating them with what was measured.

    Args:
        opened: the data and the model.
        config: of the run.
        costs: of chunks on this machine.
        around: what the plan is for.
    """

    def __init__(self, opened: Opened, config: TrainConfig, costs: ChunkCosts, around: Surroundings) -> None:
        self._opened = opened
        self._config = config
        self._costs = costs
        self._around = around

    def row(self, compress: tuple[str, ...], cuts: tuple[str, str]) -> Row:
        """Simulate one way of compressing and cutting.

        Raises:
            UserError: it does not fit the model.
        """
        model = self._model(parse_compress(compress), cuts)
        plan = best_plan(model, depth=self._depth)
        step_s = simulate(model, plan.depth, lead=plan.lead).makespan_s
        up, down = (sum(chunk.size_bytes(kinds) for chunk in model.chunks) for kinds in (UP, DOWN))
        return Row(
            compress=compress,
            cuts=cuts,
            step_s=step_s,
            samples_per_s=self._config.batch_size / step_s,
            depth=plan.depth,
            bound_by=floor(model).bound_by,
            up_bytes=up,
            down_bytes=down,
            compress_rate=(up + down) / self._costs.dense_bytes(cuts),
            edge_s=sum(chunk.compute_s(EDGE) for chunk in model.chunks),
            cloud_s=sum(chunk.compute_s(CLOUD) for chunk in model.chunks),
        )

    async def moved(self, compress: tuple[str, ...]) -> Row:
        """Simulate codecs with the cuts that make them fastest, one cut after the other."""
        compression = parse_compress(compress)
        first, second = self._opened.cuts
        deeper, later = await asyncio.to_thread(lambda: self._other_cuts)
        second = await self._quickest(compression, [(first, cut2) for cut2 in (second, *later)], 1)
        first = await self._quickest(compression, [(cut1, second) for cut1 in (first, *deeper)], 0)
        return await asyncio.to_thread(self.row, compress, (first, second))

    async def _quickest(self, compression: Compression, choices: list[tuple[str, str]], which: int) -> str:
        """Return that cut of the choices with which a step takes least; Ctrl-C waits for one of them only."""
        seconds = [await asyncio.to_thread(self._rough_s, compression, cuts) for cuts in choices]
        return choices[seconds.index(min(seconds))][which]

    @property
    def _depth(self) -> int | None:
        given = self._config.depth
        return given if given is None else min(given, self._config.chunks)

    def _model(self, compression: Compression, cuts: tuple[str, str]) -> StepModel:
        cost = self._around.speeds.scaled(self._costs.cost(cuts, compression))
        return StepModel(
            chunks=_of_step(cost, self._config),
            link=late(self._around.link, cost),
            shared_cores=self._around.shared_cores,
        )

    def _rough_s(self, compression: Compression, cuts: tuple[str, str]) -> float:
        try:
            model = self._model(compression, cuts)
        except UserError:  # it is no cut, or something crosses there that cannot
            return float("inf")
        return simulate(model, min(self._depth or _ROUGH_DEPTH, len(model.chunks)), lead=1).makespan_s

    @cached_property
    def _other_cuts(self) -> tuple[list[str], list[str]]:
        """Name other places for either cut; none where the cuts were given."""
        if self._config.cuts:
            return [], []
        model, inputs = self._opened.model, self._opened.inputs
        is_text = self._opened.spec.config is not None
        traced = export_modes(model, inputs)[False] if is_text else trace(model, training=False)
        cut1, cut2 = (find_cut(traced, cut) for cut in self._opened.cuts)
        operations = profile(model, traced, inputs, 1)
        return first_cuts(operations, cut1, cut2), second_cuts(operations, cut2)


def _of_step(cost: ChunkCost, config: TrainConfig) -> tuple[ChunkCost, ...]:
    """Return what the chunks of a step cost; the last one may be smaller."""
    full, rest = divmod(config.batch_size, config.chunk_size)
    return (cost,) * full + ((cost.scaled(rest / config.chunk_size),) if rest else ())


async def make_plan(config: PlanConfig, note: Note = lambda text: None) -> PlanReport:
    """Measure, simulate and choose.

    Args:
        config: what to plan.
        note: is told what is being done.

    Raises:
        UserError: something in the settings does not exist or does not fit.
        WireError: the server cannot be reached, or the link failed.
    """
    training = config.training
    kind = "text" if text_config.is_text(training.model) else "images"
    specs = [tuple(spec.split()) for spec in config.candidates or LADDERS[kind]]
    for spec in specs:  # what is wrong with one shows before anything is measured
        check_repetition(parse_compress(spec), varied=training.augment and kind == "images")
    place = await greet(training) if config.asks_server else None
    opened = await asyncio.to_thread(open_model, training)
    note(f"timing chunks of {training.chunk_size} samples on this machine")
    costs = await asyncio.to_thread(ChunkCosts, opened, training)
    alone = await asyncio.to_thread(costs.cost, opened.cuts, parse_compress(("none",)))
    around = await _surroundings(config, opened, costs, place, note)
    planner = Planner(opened, training, costs, around)
    compared = [rows for spec in specs if (rows := await _compare(planner, spec, opened.cuts, config, note))]
    return PlanReport(
        title=(
            f"{training.model} on {opened.samples.name}, {opened.samples.what}, batch of {training.batch_size} in "
            f"{training.chunks} chunks"
        ),
        link=around.link,
        measured=config.link is None,
        cloud_speed=1 / around.speeds.cloud,
        alone_s=sum(sum(chunk.seconds.values()) for chunk in _of_step(alone, training)),
        cuts=opened.cuts,
        rows=tuple(rows[0] for rows in compared),
        moved=tuple(row for rows in compared for row in rows[1:]),
        best=mildest([row for rows in compared for row in rows]),
    )


async def _surroundings(
    config: PlanConfig, opened: Opened, costs: ChunkCosts, place: Place | None, note: Note
) -> Surroundings:
    if place is not None:
        note(f"measuring {config.training.server}{'' if config.link else ' and the link to it'}")
        return await probe(config.training, opened, costs, place, link=config.link)
    assert config.link is not None
    share = 1 / (config.cloud_speed or 1.0)
    return Surroundings(link=config.link, speeds=Speeds(cloud=share, cloud_codecs=share))


async def _compare(
    planner: Planner, spec: tuple[str, ...], cuts: tuple[str, str], config: PlanConfig, note: Note
) -> list[Row]:
    """Return the row of a candidate, and that with other cuts where it gains from them; none if it does not fit.

    Raises:
        UserError: it does not fit, and was asked for.
    """
    try:
        row = await asyncio.to_thread(planner.row, spec, cuts)
    except UserError:
        if config.candidates:
            raise
        return []
    # Where else a bottleneck would lose little, nobody has measured.
    if not config.moves_cuts or any(parse_compress(spec).bottlenecks):
        return [row]
    note(f"looking for cuts that suit {' '.join(spec)}")
    moved = await planner.moved(spec)
    return [row, moved] if moved.step_s < row.step_s * WORTH_MOVING else [row]


def plan_command(config: PlanConfig) -> None:
    """Plan and print; what is being done goes to standard error."""

    def note(text: str) -> None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    report = run(make_plan(config, note))
    sys.stdout.write(f"{report.to_json() if config.json else report.to_text()}\n")
