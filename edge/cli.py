"""The command ``edge-client``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from common.command import run_cli, run_command
from edge.cli_options import (
    CALIBRATE_OPTIONS,
    EVALUATE_OPTIONS,
    FLOPS_OPTIONS,
    PLAN_OPTIONS,
    SECURITY_OPTIONS,
    SERVER,
    TRAIN_OPTIONS,
)
from edge.config import CalibrateConfig, TrainConfig


def _with(options: Sequence[Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(
    "edge-client",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    subcommand_metavar="[COMMAND]",
)
@SERVER
@click.option(
    "--resume",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Go on with the run whose --checkpoint this folder is; all settings are in it.",
)
@_with(SECURITY_OPTIONS)
@_with(TRAIN_OPTIONS)
@click.pass_context
def cli(context: click.Context, /, **options: Any) -> None:
    """Train a model whose middle is computed by a cloud server; data and labels stay here.

    \b
        edge-client --server HOST:PORT --compress conv
    """  # noqa: D301  (to click it is a backspace: the next lines stay as they are)
    if context.invoked_subcommand is not None:
        given = (
            name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        )
        for name in given:
            option = next(param.opts[0] for param in context.command.params if param.name == name)
            raise click.UsageError(
                f"{option} stands before {context.invoked_subcommand}; put the options of a command after its name",
                context,
            )
        return
    if (resume := options.pop("resume")) is not None:
        _resume(context, resume, options)
        return
    if options["server"] is None:
        raise click.UsageError(
            "say where the server is: --server HOST:PORT; or try edge-client demo", context
        )
    _train(options)


@cli.command()
@_with(TRAIN_OPTIONS)
def demo(**options: Any) -> None:
    """Train on loopback with a server of its own: a first look, and a check that all works."""
    given = click.get_current_context().get_parameter_source
    fitting = {name: value for name, value in _DEMO.items() if given(name) is ParameterSource.DEFAULT}
    _train({**options, **fitting, "server": "127.0.0.1:1"}, own_server=True)


@cli.command()
@SERVER
@_with(SECURITY_OPTIONS)
@_with(EVALUATE_OPTIONS)
@click.pass_context
def evaluate(context: click.Context, /, debug: bool, modules: tuple[str, ...], **options: Any) -> None:
    """Go through the test set with a trained model, over the same link and compressed alike.

    \b
        edge-client evaluate --server HOST:PORT --compress conv --weights trained.safetensors
    """  # noqa: D301  (to click it is a backspace: the next lines stay as they are)
    if options["server"] is None:
        raise click.UsageError("say where the server is: --server HOST:PORT", context)

    def work() -> None:
        from common.imports import import_modules
        from edge.command import evaluate_command

        import_modules(modules)
        evaluate_command(TrainConfig(**options, only_evaluates=True, augment=False))

    options["cuts"], options["compress"] = tuple(options["cuts"] or ()), tuple(options["compress"])
    run_command(work, debug=debug)


@cli.command()
@SERVER
@_with(SECURITY_OPTIONS)
@_with(PLAN_OPTIONS)
def plan(debug: bool, modules: tuple[str, ...], **options: Any) -> None:
    """Say where to cut a model and what to compress, from what this machine, the server and the link take.

    \b
        edge-client plan --server HOST:PORT --model resnet50
        edge-client plan --rate 100 --delay 20 --cloud-speed 10
    """  # noqa: D301  (to click it is a backspace: the next lines stay as they are)

    def work() -> None:
        from common.imports import import_modules
        from edge.planner import PlanConfig, plan_command

        import_modules(modules)
        asked = {name: options.pop(name) for name in ("rate_mbit_s", "delay_ms", "cloud_speed", "json")}
        candidates, server = tuple(options.pop("candidates") or ()), options.pop("server")
        training = TrainConfig(**options, server=server or "127.0.0.1:1")
        plan_command(
            PlanConfig(training=training, candidates=candidates, asks_server=server is not None, **asked)
        )

    options["cuts"] = tuple(options["cuts"] or ())
    run_command(work, debug=debug)


@cli.command()
@_with(FLOPS_OPTIONS)
def flops(debug: bool, modules: tuple[str, ...], **options: Any) -> None:
    """Count MACs, parameters and bytes of the three partitions; nothing is trained.

    \b
        edge-client flops --model mobilenet_v2 --compress conv
    """  # noqa: D301  (to click it is a backspace: the next lines stay as they are)

    def work() -> None:
        from common.imports import import_modules
        from edge.flops import FlopsConfig, flops_command

        import_modules(modules)
        flops_command(FlopsConfig(**options))

    options["cuts"] = tuple(options["cuts"] or ())
    run_command(work, debug=debug)


@cli.command()
@_with(CALIBRATE_OPTIONS)
def calibrate(debug: bool, modules: tuple[str, ...], **options: Any) -> None:
    """Fit a bottleneck to what crosses the cuts, here and without a server; training starts from it.

    \b
        edge-client calibrate --compress conv --weights DEFAULT --save conv.safetensors
        edge-client --server HOST:PORT --compress conv --weights DEFAULT --bottleneck conv.safetensors
    """  # noqa: D301  (to click it is a backspace: the next lines stay as they are)

    def work() -> None:
        from common.imports import import_modules
        from edge.calibrate import calibrate_command

        import_modules(modules)
        calibrate_command(CalibrateConfig(**options))

    options["cuts"], options["compress"] = tuple(options["cuts"] or ()), tuple(options["compress"])
    run_command(work, debug=debug)


_DEMO: dict[str, Any] = {
    "image_size": 96,
    "compress": ("conv",),
    "chunks": 4,
    "epochs": 4,
    "optimizer": "adamw",
    "lr": 0.0015,
    "schedule": "linear",
    "augment": False,
    "give_up_after": 30.0,  # nobody starts its server again
}


def _train(options: dict[str, Any], *, own_server: bool = False) -> None:
    debug, modules, cpu = options.pop("debug"), options.pop("modules"), options.pop("cpu")
    options["cuts"] = tuple(options["cuts"] or ())
    options["compress"] = tuple(options["compress"])

    def work() -> None:
        from common.imports import import_modules
        from edge.command import train_command

        import_modules(modules)
        train_command(TrainConfig(**options), own_server=own_server, modules=modules, cpu=cpu)

    run_command(work, debug=debug)


def _resume(context: click.Context, folder: Path, options: dict[str, Any]) -> None:
    """Go on with a run; only what was given on the command line counts beside its own settings."""
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    debug, modules = options["debug"], options["modules"]
    for name in ("debug", "modules", "cpu"):
        given.pop(name, None)

    def work() -> None:
        from common.imports import import_modules
        from edge.command import train_command
        from edge.run_folder import read_settings

        import_modules(modules)
        config, key = read_settings(folder, given)
        train_command(config, own_server=False, modules=modules, cpu=True, resumed=key)

    run_command(work, debug=debug)


def main() -> None:
    """Run the console script."""
    run_cli(cli)
