"""The command ``edge-client``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from common.choices import AMP, COUNTINGS, MEMORY_FORMATS, OPTIMIZERS, PADDINGS, SCHEDULES
from common.command import run_cli, run_command
from edge.config import DEFAULT_PORT, CalibrateConfig, TrainConfig

_DEFAULTS = {name: field.default for name, field in TrainConfig.__dataclass_fields__.items()}


def _option(name: str, help: str, **settings: Any) -> Any:
    """Make an option whose default is that of `TrainConfig`'s field of the same name."""
    field = settings.pop("field", name.removeprefix("--").replace("-", "_"))
    default = settings.pop("default", _DEFAULTS.get(field))
    return click.option(name, field, default=default, show_default=default is not None, help=help, **settings)


def _fitting(name: str, help: str, type: type = int) -> Any:
    """Make an option whose default is that of `CalibrateConfig`'s field of the same name."""
    field = CalibrateConfig.__dataclass_fields__[name.removeprefix("--").replace("-", "_")]
    return _option(name, help, default=field.default, field=field.name, type=type)


_FILE = click.Path(dir_okay=False, path_type=Path)

_MODEL_OPTIONS = (
    _option(
        "--model", "A torchvision classifier's name, a registered model's, or hf:NAME or hf:FOLDER for text."
    ),
    _option(
        "--weights",
        "Pretrained weights by torchvision's name (DEFAULT), a state-dict file, or random.  [default: random; "
        "for text those that come with the model]",
    ),
    _option(
        "--cut",
        "A cut point; give two.  [default: the model's preset]",
        field="cuts",
        multiple=True,
        default=None,
    ),
    _option(
        "--data",
        "digits, cifar10 or another set of torchvision's, folder:PATH; for text cola:PATH or hf:NAME.",
    ),
    _option("--data-root", "Where downloaded data sets lie.", type=click.Path(path_type=Path)),
    _option("--image-size", "Side of the images in pixels.  [default: the model's own]", type=int),
    _option("--max-length", "The most tokens of a text.  [default: 128]", type=int),
    _option(
        "--padding", "Pad texts to the longest of a chunk, or to --max-length.", type=click.Choice(PADDINGS)
    ),
    _option("--num-classes", "Outputs of the classifier.  [default: the data set's]", type=int),
    _option(
        "--compress",
        "What to compress with, such as conv+int8, or decay for tokens. Repeat as WHERE=SPEC to set a cut "
        "(cut1, cut2), a direction (act, grad) or both (cut1.grad) apart.",
        metavar="[WHERE=]SPEC",
        multiple=True,
    ),
)

_IMPORT = click.option(
    "--import", "modules", multiple=True, metavar="MODULE", help="Import a module that registers models."
)
_DEBUG = click.option("--debug", is_flag=True, help="Show tracebacks.")

_TRAIN_OPTIONS = (
    *_MODEL_OPTIONS,
    click.option(
        "--ragged/--no-ragged", default=True, show_default=True, help="Do not send the padding of texts."
    ),
    _option("--bottleneck", "Start the bottleneck from this file of edge-client calibrate.", type=_FILE),
    _option("--batch-size", "Samples a step.", type=int),
    _option("--chunks", "Micro-batches a step.", type=int),
    _option("--depth", "Most chunks in flight.  [default: chosen from what the first steps take]", type=int),
    _option("--epochs", "Passes over the training set.", type=int),
    _option("--steps", "Steps in all, instead of epochs.", type=int),
    _option("--seed", "Of weights, order, augmentation, dropout and rounding.", type=int),
    _option("--optimizer", "What trains.  [default: sgd; adamw for text]", type=click.Choice(OPTIMIZERS)),
    _option("--lr", "Learning rate.  [default: 0.02 for sgd, 0.001 for adamw; for text 0.00002]", type=float),
    _option("--momentum", "Of SGD.", type=float),
    _option("--weight-decay", "As the optimizer means it.", type=float),
    _option(
        "--schedule",
        "How the learning rate goes on after the warm-up.  [default: constant; polynomial for text]",
        type=click.Choice(SCHEDULES),
    ),
    _option(
        "--warmup-steps",
        "Steps to reach the full learning rate.  [default: 0; for text a 16th of all]",
        type=int,
    ),
    _option("--power", "Of the polynomial schedule.", type=float),
    _option("--clip-norm", "Largest gradient norm over the whole model.", type=float),
    _option("--amp", "Mixed precision on the server.", type=click.Choice(AMP)),
    _option(
        "--memory-format",
        "Layout of images in memory; auto measures.",
        type=click.Choice(MEMORY_FORMATS),
    ),
    _option("--threads", "Threads for computing.  [default: one a core]", type=int),
    click.option(
        "--augment/--no-augment", default=True, show_default=True, help="Flip and crop training images."
    ),
    _option("--train-limit", "Use only so many training images.", type=int),
    _option("--test-limit", "Use only so many test images.", type=int),
    _option("--eval-every", "Evaluate every so many steps; 0 for never.  [default: every epoch]", type=int),
    _option("--give-up-after", "Seconds without a step until a lost link ends the run.", type=float),
    _option(
        "--checkpoint",
        "Keep in this folder what --resume goes on from; the server keeps its part.",
        type=click.Path(file_okay=False, path_type=Path),
    ),
    _option("--checkpoint-every", "Steps between checkpoints.", type=int),
    _option("--keep-checkpoints", "How many stay.", type=int),
    _option("--save", "Write the trained model here (safetensors).", type=_FILE),
    _option("--metrics", "Write JSON lines here.", type=_FILE),
    _option("--trace", "Write a timeline of both sides here (Chrome trace format).", type=_FILE),
    _IMPORT,
    click.option(
        "--cpu",
        is_flag=True,
        help="Compute on the CPU. The edge always does; so does the demo's server then.",
    ),
    _DEBUG,
)

_CALIBRATE_OPTIONS = (
    *_MODEL_OPTIONS,
    click.option("--save", required=True, type=_FILE, help="Write the bottleneck here (safetensors)."),
    _fitting("--samples", "Training samples to record."),
    _fitting("--batch-size", "Samples a batch."),
    _fitting("--epochs", "Passes over the recorded samples."),
    _fitting("--steps", "Steps of fitting at each cut, instead of epochs."),
    _fitting("--lr", "Learning rate of fitting, at first; it falls to nothing.", type=float),
    _option("--seed", "Of weights, order and dropout.", type=int),
    _option("--threads", "Threads for computing.  [default: one a core]", type=int),
    _option("--train-limit", "Use only so many training images.", type=int),
    _IMPORT,
    _DEBUG,
)

_FLOPS_OPTIONS = (
    _option(
        "--model", "A torchvision classifier's name, a registered model's, or hf:NAME or hf:FOLDER for text."
    ),
    _option(
        "--cut",
        "A cut point; give two.  [default: the model's preset]",
        field="cuts",
        multiple=True,
        default=None,
    ),
    _option("--image-size", "Side of the images in pixels.  [default: the model's own]", type=int),
    _option("--max-length", "Tokens of a text.  [default: 128]", type=int),
    _option("--num-classes", "Outputs of the classifier.  [default: 1000; 2 for text]", type=int),
    _option(
        "--compress",
        "What to compress with, as in training. Bottlenecks count; codecs change neither MACs nor tensors.",
        metavar="[WHERE=]SPEC",
        multiple=True,
    ),
    _option("--batch-size", "Samples.", type=int),
    click.option(
        "--count",
        type=click.Choice(COUNTINGS),
        default=COUNTINGS[0],
        show_default=True,
        help="How a transposed convolution counts: what it computes, or as published figures have it.",
    ),
    click.option("--json", is_flag=True, help="Print one JSON object."),
    click.option("--plot", type=_FILE, help="Draw MACs and bytes along the model here (.png, .svg, .pdf)."),
    _IMPORT,
    _DEBUG,
)


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
@click.option("--server", metavar="HOST:PORT", help=f"The cloud server.  [default port: {DEFAULT_PORT}]")
@click.option(
    "--resume",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Go on with the run whose --checkpoint this folder is; all settings are in it.",
)
@_with(_TRAIN_OPTIONS)
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
@_with(_TRAIN_OPTIONS)
def demo(**options: Any) -> None:
    """Train on loopback with a server of its own: a first look, and a check that all works."""
    given = click.get_current_context().get_parameter_source
    fitting = {name: value for name, value in _DEMO.items() if given(name) is ParameterSource.DEFAULT}
    _train({**options, **fitting, "server": "127.0.0.1:1"}, own_server=True)


@cli.command()
@_with(_FLOPS_OPTIONS)
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
@_with(_CALIBRATE_OPTIONS)
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
