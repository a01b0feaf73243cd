"""What to train, on what, and how: everything that the command line and the Python API can set."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from common.choices import AMP, MEMORY_FORMATS, OPTIMIZERS, PADDINGS, SCHEDULES
from common.errors import UserError

DEFAULT_PORT = 7433
_LARGEST_SEED = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run; each is an option of ``edge-client`` of the same name.

    Attributes:
        server: ``HOST:PORT`` of the cloud server.
        model: a name from torchvision's classifiers, a registered one, or ``hf:`` and a text model's name or folder.
        weights: torchvision's name of pretrained weights, a state-dict file, ``random``, or None for random ones,
            for text those that come with the model. A file that `save` named brings the bottleneck, too, where
            `compress` has the same.
        cuts: the two cut points; empty for the model's preset.
        data: a data set's name, ``folder:PATH``; for text ``cola:PATH`` or ``hf:NAME``.
        data_root: where downloaded data sets lie.
        image_size: side of the images in pixels; None for the model's own.
        max_length: the most tokens of a text; None for 128.
        padding: ``longest`` pads the texts of a chunk to the longest of them, ``max`` to `max_length`.
        ragged: leave the padding of texts out of what crosses.
        num_classes: of the classifier; None for the data set's.
        compress: values of ``--compress``; one of them may stand without a tuple.
        bottleneck: file of ``edge-client calibrate`` that the bottleneck starts from; None for that in `weights`, or
            else for the first samples.
        batch_size: samples a step.
        chunks: micro-batches a step.
        depth: most chunks in flight; None to choose it from what the first steps take.
        epochs: passes over the training set; ignored where `steps` is given.
        steps: steps in all.
        seed: of weights, order, augmentation, dropout and rounding.
        optimizer: ``sgd`` or ``adamw``; None for ``sgd``, for text ``adamw``.
        lr: learning rate; None for the optimizer's default here.
        momentum: of SGD.
        weight_decay: as the optimizer means it.
        schedule: ``constant``, ``linear``, ``cosine`` or ``polynomial``; None for ``constant``, for text
            ``polynomial``.
        warmup_steps: steps to reach the full learning rate; None for none, for text a sixteenth of all.
        power: of the polynomial schedule.
        clip_norm: largest global gradient norm; None for no clipping.
        amp: ``none``, ``bf16`` or ``fp16`` on the server.
        memory_format: ``auto``, ``contiguous`` or ``channels_last``.
        threads: torch's threads; None for one a core.
        augment: flip and crop the training images.
        train_limit: use only so many training samples.
        test_limit: use only so many test samples.
        eval_every: evaluate every so many steps; None for the end of each epoch; 0 for never.
        give_up_after: seconds without a step, or a piece of an evaluation, until a lost link ends the run.
        checkpoint: folder that the run can go on from; both sides write checkpoints then.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many stay.
        save: where the trained model goes.
        metrics: where JSON lines go.
        trace: where the timeline goes.
        only_evaluates: test the model as it is, and train nothing; what says how to train counts for nothing then.
        token_file: holds the token that the server asks for.
        tls: encrypt, and have the system's authorities know the server's certificate.
        tls_fingerprint: SHA-256 of the certificate that the server has to show, 64 hexadecimal digits; encrypts.
        tls_ca: PEM file of the authorities that may have signed the server's certificate; encrypts.
        tls_cert: PEM file of the certificate to show to a server that asks for one.
        tls_key: PEM file of its private key.
    """

    server: str
    model: str = "mobilenet_v2"
    weights: str | None = None
    cuts: tuple[str, ...] = ()
    data: str = "digits"
    data_root: Path | None = None
    image_size: int | None = None
    max_length: int | None = None
    padding: str = "longest"
    ragged: bool = True
    num_classes: int | None = None
    compress: tuple[str, ...] | str = ("none",)
    bottleneck: Path | None = None
    batch_size: int = 64
    chunks: int = 8
    depth: int | None = None
    epochs: int = 1
    steps: int | None = None
    seed: int = 0
    optimizer: str | None = None
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str | None = None
    warmup_steps: int | None = None
    power: float = 1.0
    clip_norm: float | None = None
    amp: str = "none"
    memory_format: str = "auto"
    threads: int | None = None
    augment: bool = True
    train_limit: int | None = None
    test_limit: int | None = None
    eval_every: int | None = None
    give_up_after: float = 3600.0
    checkpoint: Path | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    save: Path | None = None
    metrics: Path | None = None
    trace: Path | None = None
    only_evaluates: bool = False
    token_file: Path | None = None
    tls: bool = False
    tls_fingerprint: str | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without data, model or server.

        Raises:
            UserError: what is wrong, and what would be right.
        """
        parse_address(self.server)
        if isinstance(self.compress, str):
            object.__setattr__(self, "compress", (self.compress,))
        weights = self.weights or ""
        if "." in weights and "/" not in weights and Path(weights).is_file():
            object.__setattr__(self, "weights", f"./{weights}")  # a path, whatever its ending
        if len(self.cuts) not in (0, 2):
            raise UserError(
                f"a model is cut at two points, not {len(self.cuts)}: give --cut twice, or not at all"
            )
        for name, value, low in (
            ("batch-size", self.batch_size, 1),
            ("chunks", self.chunks, 1),
            ("epochs", self.epochs, 1),
            ("steps", self.steps, 1),
            ("depth", self.depth, 1),
            ("threads", self.threads, 1),
            ("image-size", self.image_size, 1),
            ("num-classes", self.num_classes, 1),
            ("max-length", self.max_length, 4),
            ("train-limit", self.train_limit, 1),
            ("test-limit", self.test_limit, 1),
            ("eval-every", self.eval_every, 0),
            ("seed", self.seed, 0),
            ("give-up-after", self.give_up_after, 0),
            ("checkpoint-every", self.checkpoint_every, 1),
            ("keep-checkpoints", self.keep_checkpoints, 1),
        ):
            if value is not None and value < low:
                raise UserError(f"--{name} must be at least {low}, not {value}")
        if self.seed > _LARGEST_SEED:
            raise UserError(f"--seed must be at most {_LARGEST_SEED}, not {self.seed}")
        if self.only_evaluates and (self.save is not None or self.checkpoint is not None):
            raise UserError("where nothing is trained there is nothing for --save or --checkpoint to keep")
        if self.batch_size < self.chunks:
            raise UserError(
                f"a batch of {self.batch_size} cannot be cut into {self.chunks} chunks: "
                f"give --chunks {self.batch_size} or fewer, or a larger --batch-size"
            )
        for name, chosen, choices in (
            ("amp", self.amp, AMP),
            ("memory-format", self.memory_format, MEMORY_FORMATS),
            ("padding", self.padding, PADDINGS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if chosen is not None and chosen not in choices:
                raise UserError(f"--{name} must be one of {', '.join(choices)}, not {chosen!r}")
        for option, path in (("save", self.save), ("metrics", self.metrics), ("trace", self.trace)):
            why_not = None if path is None else _why_not(path, in_place=option == "metrics")
            if why_not is not None:
                raise UserError(f"--{option} {path}: {why_not}")

    @property
    def chunk_size(self) -> int:
        """Samples in a chunk of a whole batch, as `torch.chunk` cuts: in all but the last, which may have fewer."""
        return -(-self.batch_size // self.chunks)

    def at(self, server: str) -> "TrainConfig":
        """Return the same settings for another server."""
        return replace(self, server=server)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Settings of ``edge-client calibrate``; each is an option of the same name.

    What `TrainConfig` has too means the same here.

    Attributes:
        save: where the bottleneck goes.
        samples: training samples to record what crosses the cuts of.
        epochs: passes over them; ignored where `steps` is given.
        steps: of fitting, at each cut.
        lr: of fitting, at first.
    """

    save: Path
    model: str = TrainConfig.model
    weights: str | None = None
    cuts: tuple[str, ...] = ()
    data: str = TrainConfig.data
    data_root: Path | None = None
    image_size: int | None = None
    max_length: int | None = None
    padding: str = TrainConfig.padding
    num_classes: int | None = None
    compress: tuple[str, ...] | str = ("conv",)
    batch_size: int = TrainConfig.batch_size
    samples: int = 2048
    epochs: int = 10
    steps: int | None = None
    lr: float = 1e-3
    seed: int = 0
    threads: int | None = None
    train_limit: int | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without data or model.

        Raises:
            UserError: what is wrong, and what would be right.
        """
        for name, value in (("samples", self.samples), ("epochs", self.epochs), ("steps", self.steps)):
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"--lr must be above 0, not {self.lr}")
        self.training()

    def training(self) -> TrainConfig:
        """Return the settings of a run that the bottleneck is for, as far as they matter to it."""
        shared = {name: value for name, value in vars(self).items() if name not in _OF_FITTING}
        return TrainConfig(server="127.0.0.1:1", chunks=1, steps=1, **shared)


_OF_FITTING = ("samples", "epochs", "steps", "lr")


def _why_not(path: Path, *, in_place: bool) -> str | None:
    """Say why a file cannot be written, or where not `in_place` replaced, as far as can be told beforehand."""
    if path.is_dir():
        return "is a directory; name a file"
    if not in_place and path.exists() and not path.is_file():
        return "is no regular file, and would be replaced by one; name another"
    if not path.parent.is_dir():
        return f"there is no directory {path.parent}; create it first"
    if not os.access(path if in_place and path.exists() else path.parent, os.W_OK):
        return "may not be written by this user; choose another place"
    return None


def parse_address(text: str) -> tuple[str, int]:
    """Split ``HOST:PORT``, ``[IPV6]:PORT`` or ``HOST`` (the default port).

    Raises:
        UserError: what an address looks like.
    """
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    is_host = host and "/" not in host and (bracketed or ":" not in host)
    if not is_host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UserError(
            f"--server {text!r} is no address; give HOST:PORT, such as 10.0.0.5:{DEFAULT_PORT} or "
            f"[fd00::5]:{DEFAULT_PORT}"
        )
    return host, int(port)
