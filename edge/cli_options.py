"""The options of ``edge-client`` and its commands."""

from pathlib import Path
from typing import Any

import click

from common.choices import AMP, COUNTINGS, MEMORY_FORMATS, OPTIMIZERS, PADDINGS, SCHEDULES
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

_WHAT_OPTIONS = (
    _option(
        "--model", "A torchvision classifier's name, a registered model's, or hf:NAME or hf:FOLDER for text."
    ),
    _option(
        "--weights",
        "Pretrained weights by torchvision's name (DEFAULT), a state-dict file, or random. A file of --save brings "
        "its bottleneck, too.  [default: random; for text those that come with the model]",
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
)
_MODEL_OPTIONS = (
    *_WHAT_OPTIONS,
    _option(
        "--compress",
        "What to compress with, such as conv+int8, or decay for tokens; in training auto measures and chooses. "
        "Repeat as WHERE=SPEC to set a cut (cut1, cut2), a direction (act, grad) or both (cut1.grad) apart.",
        metavar="[WHERE=]SPEC",
        multiple=True,
    ),
)

_IMPORT = click.option(
    "--import", "modules", multiple=True, metavar="MODULE", help="Import a module that registers models."
)
_DEBUG = click.option("--debug", is_flag=True, help="Show tracebacks.")

_RAGGED = click.option(
    "--ragged/--no-ragged", default=True, show_default=True, help="Do not send the padding of texts."
)
_BOTTLENECK = _option(
    "--bottleneck", "Start the bottleneck from this file of edge-client calibrate.", type=_FILE
)
_SEED = _option("--seed", "Of weights, order, augmentation, dropout and rounding.", type=int)
_AMP = _option("--amp", "Mixed precision on the server.", type=click.Choice(AMP))
_MEMORY_FORMAT = _option(
    "--memory-format",
    "Layout of images in memory; auto measures.",
    type=click.Choice(MEMORY_FORMATS),
)
_TEST_LIMIT = _option("--test-limit", "Use only so many test samples.", type=int)
_GIVE_UP_AFTER = _option(
    "--give-up-after", "Seconds without any progress until a lost link ends the run.", type=float
)
_METRICS = _option("--metrics", "Write JSON lines here.", type=_FILE)
_AUGMENT = click.option(
    "--augment/--no-augment", default=True, show_default=True, help="Flip and crop training images."
)
_JSON = click.option("--json", is_flag=True, help="Print one JSON object.")
_THREADS = _option("--threads", "Threads for computing.  [default: one a core]", type=int)

TRAIN_OPTIONS = (
    *_MODEL_OPTIONS,
    _RAGGED,
    _BOTTLENECK,
    _option("--batch-size", "Samples a step.", type=int),
    _option("--chunks", "Micro-batches a step.", type=int),
    _option("--depth", "Most chunks in flight.  [default: chosen from what the first steps take]", type=int),
    _option("--epochs", "Passes over the training set.", type=int),
    _option("--steps", "Steps in all, instead of epochs.", type=int),
    _SEED,
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
    _AMP,
    _MEMORY_FORMAT,
    _THREADS,
    _AUGMENT,
    _option("--train-limit", "Use only so many training samples.", type=int),
    _TEST_LIMIT,
    _option("--eval-every", "Evaluate every so many steps; 0 for never.  [default: every epoch]", type=int),
    _GIVE_UP_AFTER,
    _option(
        "--checkpoint",
        "Keep in this folder what --resume goes on from; the server keeps its part.",
        type=click.Path(file_okay=False, path_type=Path),
    ),
    _option("--checkpoint-every", "Steps between checkpoints.", type=int),
    _option("--keep-checkpoints", "How many stay.", type=int),
    _option("--save", "Write the trained model here (safetensors).", type=_FILE),
    _METRICS,
    _option("--trace", "Write a timeline of both sides here (Chrome trace format).", type=_FILE),
    _IMPORT,
    click.option(
        "--cpu",
        is_flag=True,
        help="Compute on the CPU. The edge always does; so does the demo's server then.",
    ),
    _DEBUG,
)

PLAN_OPTIONS = (
    *_WHAT_OPTIONS,
    _option(
        "--compress",
        "Compare this; repeat for others, those that lose least first. Several values of training's option stand in "
        "one, with spaces between.  [default: some that suit the model]",
        field="candidates",
        metavar="SPEC",
        multiple=True,
        default=None,
    ),
    click.option(
        "--rate",
        "rate_mbit_s",
        type=float,
        help="Assume a link of so many Mbit/s in place of the one there is.",
    ),
    click.option("--delay", "delay_ms", type=float, help="Its one-way delay in ms.  [default: 0]"),
    click.option(
        "--cloud-speed",
        type=float,
        help="Without a server: assume that it computes so many times as fast as this machine.  [default: 1]",
    ),
    _RAGGED,
    _option("--batch-size", "Samples a step.", type=int),
    _option("--chunks", "Micro-batches a step.", type=int),
    _option("--depth", "Most chunks in flight.  [default: what is fastest]", type=int),
    _SEED,
    _AMP,
    _MEMORY_FORMAT,
    _THREADS,
    _AUGMENT,
    _JSON,
    _IMPORT,
    _DEBUG,
)

EVALUATE_OPTIONS = (
    *_MODEL_OPTIONS,
    _RAGGED,
    _BOTTLENECK,
    _option("--batch-size", "Samples under way at once.", type=int),
    _option("--chunks", "Messages that those cross in.", type=int),
    _SEED,
    _AMP,
    _MEMORY_FORMAT,
    _THREADS,
    _TEST_LIMIT,
    _GIVE_UP_AFTER,
    _METRICS,
    _IMPORT,
    _DEBUG,
)

CALIBRATE_OPTIONS = (
    *_MODEL_OPTIONS,
    click.option("--save", required=True, type=_FILE, help="Write the bottleneck here (safetensors)."),
    _fitting("--samples", "Training samples to record."),
    _fitting("--batch-size", "Samples a batch."),
    _fitting("--epochs", "Passes over the recorded samples."),
    _fitting("--steps", "Steps of fitting at each cut, instead of epochs."),
    _fitting("--lr", "Learning rate of fitting, at first; it falls to nothing.", type=float),
    _option("--seed", "Of weights, order and dropout.", type=int),
    _THREADS,
    _option("--train-limit", "Use only so many training samples.", type=int),
    _IMPORT,
    _DEBUG,
)

FLOPS_OPTIONS = (
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
    _JSON,
    click.option("--plot", type=_FILE, help="Draw MACs and bytes along the model here (.png, .svg, .pdf)."),
    _IMPORT,
    _DEBUG,
)

SERVER = click.option(
    "--server", metavar="HOST:PORT", help=f"The cloud server.  [default port: {DEFAULT_PORT}]"
)

SECURITY_OPTIONS = (
    _option("--token-file", "Holds the token that the server asks for.", type=_FILE),
    _option(
        "--tls-fingerprint",
        "Encrypt; the server is the one whose certificate has this SHA-256.",
        metavar="HEX",
    ),
    click.option("--tls", is_flag=True, help="Encrypt; this system's authorities vouch for the server."),
    _option("--tls-ca", "Encrypt; the authorities in this file (PEM) vouch for the server.", type=_FILE),
    _option("--tls-cert", "Show this certificate (PEM) to a server that asks for one.", type=_FILE),
    _option("--tls-key", "Its private key (PEM).", type=_FILE),
)
