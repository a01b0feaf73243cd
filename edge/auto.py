"""``--compress auto``: the mildest compression that this machine, link and server train fast with."""

from collections.abc import Callable
from dataclasses import replace

from common.errors import UserError
from common.runtime import release_memory
from edge.compress import AUTO, asks_for_auto
from edge.config import TrainConfig
from edge.plan_report import PlanReport, figure
from edge.planner import PlanConfig, make_plan
from edge.progress import Progress
from edge.result import TrainResult
from edge.run_folder import RunFolder
from edge.trainer import Trainer

__all__ = ["settle", "train_settled"]


async def settle(config: TrainConfig, note: Callable[[str], None]) -> TrainConfig:
    """Put what ``auto`` chooses in its place; other settings come back as they are.

    Args:
        config: of a run.
        note: is told what is chosen, and why.

    Raises:
        UserError: ``auto`` does not stand alone, or does not go with something; or as `make_plan`.
        WireError: as `make_plan`.
    """
    if not asks_for_auto(config.compress):
        return config
    if config.compress != (AUTO,):
        raise UserError(f"--compress {AUTO} chooses for both cuts and directions: leave the others out")
    if config.only_evaluates or config.bottleneck is not None:
        what = "an evaluation" if config.only_evaluates else "--bottleneck"
        raise UserError(f"--compress {AUTO} does not go with {what}: name what the model was fitted to")
    if config.checkpoint is not None:  # before minutes are spent
        RunFolder(config.checkpoint, keep=config.keep_checkpoints, warn=note).check_unused()
    plan = PlanConfig(training=replace(config, compress=("none",)), moves_cuts=False)
    report = await make_plan(plan, note)
    release_memory()  # what was measured with
    note(_chosen(report))
    return replace(config, compress=report.best.compress)


async def train_settled(config: TrainConfig, progress: Progress) -> TrainResult:
    """Train from code; see `edge.trainer.train`."""
    config = await settle(config, progress.note)
    return await Trainer(config, progress, keep_state=True).run()


def _chosen(report: PlanReport) -> str:
    best = report.best
    others = ", ".join(
        f"{' '.join(row.compress)} {figure(row.step_s)}" for row in report.rows if row is not best
    )
    return (
        f"{AUTO} chooses {report.options(best)}: {figure(best.step_s)} s a step expected, bound by {best.bound_by} "
        f"(s a step with {others})"
    )
