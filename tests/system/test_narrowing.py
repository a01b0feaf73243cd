"""Bottlenecks of transformers over a real link: what crosses narrows, and training is that of one machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import token_model  # noqa: F401  (registers its model here too)
from common.bottleneck import with_bottleneck
from common.models import ModelSpec, build_model
from common.partition import image_input, split
from common.seeding import derive_seed
from common.weights import load_state
from edge.config import TrainConfig
from edge.data.datasets import open_dataset
from edge.data.loader import eval_batches, train_batches
from edge.job import Job, prepare
from edge.trainer import train
from tests.system.peer import Peer
from tests.system.processes import Command, events, run, serving
from tests.system.reference import reseed_on_entry
from wire.messages import Abort, Begin, Forward
from wire.streams import StreamEncoder, chunk_message

TOKENS = (
    *("--import", "token_model", "--model", "token_net", "--cut", "embed", "--cut", "blocks"),
    *("--image-size", "16", "--batch-size", "8", "--chunks", "2", "--threads", "1", "--train-limit", "64"),
    *("--test-limit", "8", "--memory-format", "contiguous"),
)
DENSE_BYTES = 8 * 16 * 24 * 4  # of one cut in one direction: a batch of 8 samples [16, 24]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Command, str]]:
    with serving("--import", "token_model") as started:
        yield started
        assert "Traceback" not in started[0].err


@pytest.fixture(scope="module")
def address(server: tuple[Command, str]) -> str:
    return server[1]


def trained(address: str, folder: Path, *arguments: object) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train; gives the model and the metrics' lines."""
    saved, metrics = folder / "model.safetensors", folder / "metrics.jsonl"
    outputs = ("--save", saved, "--metrics", metrics)
    ended = run("edge-client", "--server", address, *TOKENS, *arguments, *outputs)
    assert (ended.status, ended.err) == (0, ""), ended
    return load_state(saved), events(metrics)


# What crosses.


def test_linear_sends_its_width_of_every_token(address: str, tmp_path: Path) -> None:
    _, dense = trained(address, tmp_path, "--steps", 2, "--eval-every", 0)
    state, lines = trained(address, tmp_path, "--steps", 2, "--eval-every", 0, "--compress", "linear:12,6")
    assert state["bottleneck.cut1.encoder.0.weight"].shape == (12, 24)
    assert state["bottleneck.cut2.decoder.0.weight"].shape == (24, 6)
    for direction in ("up_bytes", "down_bytes"):
        saved = dense[1][direction] - lines[1][direction]
        assert saved == pytest.approx(DENSE_BYTES * (1 / 2 + 3 / 4), rel=0.05)


@pytest.mark.parametrize(
    ("spec", "shares"),
    [
        ("decay:rate=0.8,steps=2,iterations=2", [1, 1, 19 / 24, 19 / 24, 15 / 24, 15 / 24, 15 / 24]),
        ("decay:rate=1,rate2=0.5,steps=3,iterations=2", [1, 1, 1, 1 / 2, 1 / 2, 1 / 2, 1 / 4]),
        ("decay:rate=0.8,rate2=0.5,steps=3,iterations=1,l1=1e-3,start=pca", [1] * 3 + [19 / 48] * 4),
    ],
)
def test_bytes_on_the_socket_fall_as_the_width_does(
    address: str, tmp_path: Path, spec: str, shares: list[float]
) -> None:
    _, lines = trained(address, tmp_path, "--steps", 7, "--eval-every", 1, "--compress", spec)
    steps = [line for line in lines if line["event"] == "step"]
    assert len([line for line in lines if line["event"] == "eval"]) == 7
    for direction in ("up_bytes", "down_bytes"):
        for line, share in zip(steps, shares, strict=True):
            # One cut's activations and the other's gradients; heads, heartbeats and reports are the tolerance.
            fallen = steps[0][direction] - line[direction]
            assert fallen == pytest.approx(2 * DENSE_BYTES * (1 - share), abs=0.05 * DENSE_BYTES), line
    for line, share in zip(steps[1:], shares[1:], strict=True):
        assert line["compress_rate"] == pytest.approx(share, abs=0.06)


def test_codecs_behind_a_pair_narrow_with_it(address: str, tmp_path: Path) -> None:
    """Whatever a codec remembers of the width before."""
    spec = "decay:rate=0.8,steps=2,iterations=3"
    rates = {}
    for chain in ("int8+lz4", "lowrank:3", "topk:0.2,feedback", "int4:group=8,hadamard"):
        _, lines = trained(address, tmp_path, "--steps", 7, "--compress", f"{spec}+{chain}")
        steps = [line["up_bytes"] for line in lines if line["event"] == "step"]
        rates[chain] = steps[-1] / steps[0]
    assert max(rates.values()) < 0.9, rates


def test_saved_file_holds_the_narrow_pair_and_how_many_steps_made_it(address: str, tmp_path: Path) -> None:
    state, lines = trained(
        address, tmp_path, "--steps", 5, "--compress", "decay:rate=0.8,steps=2,iterations=2"
    )
    pairs = {name: tensor for name, tensor in state.items() if name.startswith("bottleneck.")}
    assert {name.split(".")[1] + name.split(".")[2] for name in pairs} == {
        f"cut{cut}{half}" for cut in (1, 2) for half in ("encoder", "decoder")
    }
    assert {int(tensor) for name, tensor in pairs.items() if name.endswith(".steps")} == {5}
    spec = ModelSpec(name="token_net", num_classes=10)
    parts = split(build_model(spec), ("embed", "blocks"), image_input(16))
    plain = {name: tensor for name, tensor in state.items() if not name.startswith("bottleneck.")}
    assert plain.keys() == build_model(spec).state_dict().keys()
    # The accuracy that was reported is that of the narrow model.
    dataset = open_dataset("digits", seed=0, train_limit=64, test_limit=8)
    parts = with_bottleneck(parts, ("decay:rate=0.8,steps=2,iterations=2",) * 2, seed=0)
    for part in parts.partitions.values():
        part.load_state_dict({name: state[name] for name in part.state_dict()}, strict=True)
        part.eval()
    with eval_batches(dataset.test, batch_size=8, image_size=16, normalise=dataset.normalise) as batches:
        (batch,) = batches
    with torch.inference_mode():
        loss = functional.cross_entropy(parts.run(*batch.inputs)[0], batch.labels).item()
    assert loss == pytest.approx([line for line in lines if line["event"] == "eval"][-1]["loss"], rel=1e-4)


# One machine's training.


class PlainPair(nn.Module):
    """A square pair as one would write it without a cut."""

    def __init__(self, full: int, length: int | None) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.eye(full)), nn.Parameter(torch.eye(full))
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(full)), nn.Parameter(torch.zeros(full))
        self.short = nn.Parameter(torch.eye(length)) if length else None
        self.long = nn.Parameter(torch.eye(length)) if length else None
        self.short_bias = nn.Parameter(torch.zeros(length)) if length else None
        self.long_bias = nn.Parameter(torch.zeros(length)) if length else None

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.down, self.down_bias)
        if self.short is not None:
            for weight, bias in ((self.short, self.short_bias), (self.long, self.long_bias)):
                x = torch.bmm(weight.expand(len(x), *weight.shape), x) + bias[:, None]
        return functional.linear(x, self.up, self.up_bias)

    def narrowed(self) -> dict[str, int]:
        """Which side of each parameter narrows."""
        features = {"down": 0, "up": 1, "down_bias": 0}
        return features if self.short is None else {**features, "short": 0, "long": 1, "short_bias": 0}


def train_on_one_machine(
    config: TrainConfig,
    widths: dict[int, tuple[int, int]],
    following: dict[int, tuple[int, int]],
    *,
    length: int | None,
    l1: float,
    options: dict[str, float],
) -> tuple[list[float], dict[str, Tensor]]:
    """Train the token model with plain pairs; `widths` are (H, S) from a step on, `following` those to come."""
    torch.set_num_threads(1)
    dataset = open_dataset("digits", seed=config.seed, train_limit=config.train_limit)
    model = build_model(ModelSpec(name="token_net", num_classes=10, seed=config.seed))
    pairs = nn.ModuleList(PlainPair(24, length) for _ in range(2))
    model.blocks = nn.Sequential(pairs[0], *model.blocks)
    model.head = nn.Sequential(pairs[1], model.head)
    model.train()
    kind = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=config.lr, **options)
    place = {"step": 0, "chunk": 0}
    for part, module in (("front", model.embed.drop), ("middle", model.blocks[1].drop)):
        reseed_on_entry(module, config.seed, part, place)
    reseed_on_entry(model.head[1].drop, config.seed, "back", place)
    losses = []
    batches = train_batches(
        dataset.train,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=0,
        epochs=config.steps,
        image_size=16,
        normalise=dataset.normalise,
        augment=dataset.augment,
    )
    with batches:
        for step, batch in zip(range(1, config.steps + 1), batches, strict=False):
            total = 0.0
            images, labels = batch.inputs[0].chunk(config.chunks), batch.labels.chunk(config.chunks)
            for chunk, (x, y) in enumerate(zip(images, labels, strict=True)):
                place.update(step=step, chunk=chunk)
                loss = functional.cross_entropy(model(x), y)
                (loss * (len(y) / len(batch.labels))).backward()
                total += loss.item() * len(y)
            losses.append(total / len(batch.labels))
            for pair in pairs:
                for name, dim in pair.narrowed().items():
                    parameter = getattr(pair, name)
                    width = following[max(s for s in following if s <= step)][
                        "short" in name or name == "long"
                    ]
                    if "bias" not in name:
                        beyond = (*[slice(None)] * dim, slice(width, None))
                        parameter.grad[beyond] += l1 * parameter.detach()[beyond].sign()
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 in widths:
                for pair in pairs:
                    narrow(pair, optimizer, widths[step + 1])
    return losses, dict(model.state_dict())


def narrow(pair: PlainPair, optimizer: torch.optim.Optimizer, width: tuple[int, int]) -> None:
    """Put smaller parameters in the place of a pair's, for the optimizer too."""
    for name, dim in pair.narrowed().items():
        old = getattr(pair, name)
        kept = (*[slice(None)] * dim, slice(0, width["short" in name or name == "long"]))
        new = nn.Parameter(old.detach()[kept].clone())
        setattr(pair, name, new)
        (group,) = optimizer.param_groups
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        memory = optimizer.state.pop(old)
        optimizer.state[new] = {
            key: value[kept].clone() if torch.is_tensor(value) and value.dim() else value
            for key, value in memory.items()
        }


NAMES = {  # of a plain pair's parameters, and of the product's halves; the sequence's stand inside
    "down": ("encoder.0.weight", "encoder.0.weight"),
    "down_bias": ("encoder.0.bias", "encoder.0.bias"),
    "up": ("decoder.0.weight", "decoder.1.weight"),
    "up_bias": ("decoder.0.bias", "decoder.1.bias"),
    "short": ("", "encoder.1.weight"),
    "short_bias": ("", "encoder.1.bias"),
    "long": ("", "decoder.0.weight"),
    "long_bias": ("", "decoder.0.bias"),
}


@pytest.mark.parametrize(
    ("optimizer", "options", "rate2"),
    [("sgd", {"momentum": 0.9}, None), ("adamw", {"weight_decay": 0.05}, 0.75), ("sgd", {"momentum": 0.9}, 0.75)],
    ids=["sgd", "adamw on two axes", "sgd on two axes"],
)  # fmt: skip
@pytest.mark.parametrize("l1", [0, 0.01])
def test_training_while_narrowing_is_that_of_one_machine_to_the_bit(
    address: str, tmp_path: Path, optimizer: str, options: dict[str, float], rate2: float | None, l1: float
) -> None:
    second = "" if rate2 is None else f",rate2={rate2}"
    config = TrainConfig(
        server=address,
        model="token_net",
        cuts=("embed", "blocks"),
        image_size=16,
        batch_size=10,
        chunks=3,
        steps=9,
        optimizer=optimizer,
        lr=0.05 if optimizer == "sgd" else 0.003,
        weight_decay=options.get("weight_decay", 0.0),
        train_limit=64,
        test_limit=8,
        threads=1,
        eval_every=2,
        memory_format="contiguous",
        compress=f"decay:rate=0.8,steps=3,iterations=2,l1={l1}{second}",
        metrics=tmp_path / "metrics.jsonl",
    )
    result = train(config)
    losses, state = train_on_one_machine(
        config,
        {4: (19, 12), 7: (15, 9)},
        {1: (19, 12), 4: (15, 9), 7: (15, 9)},
        length=None if rate2 is None else 16,
        l1=l1,
        options=options,
    )
    lines = events(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines if line["event"] == "step"] == losses
    expected = {}
    for name, tensor in state.items():
        for cut, before in ((1, "blocks.0."), (2, "head.0.")):
            if name.startswith(before):
                name = f"bottleneck.cut{cut}.{NAMES[name.removeprefix(before)][rate2 is not None]}"
        first, second_, *rest = name.split(".")
        if first == "blocks":
            name = ".".join((first, str(int(second_) - 1), *rest))
        expected[name.replace("head.1.", "head.")] = tensor
    trained = {name: tensor for name, tensor in result.state.items() if not name.endswith(".steps")}
    assert trained.keys() == expected.keys()
    assert trained["bottleneck.cut1.encoder.0.weight"].shape == (15, 24)
    for name, tensor in trained.items():
        assert torch.equal(tensor, expected[name]), name


# Steps that come to nothing.


def narrowing_job() -> Job:
    return prepare(
        TrainConfig(
            server="nowhere:1",
            model="token_net",
            cuts=("embed", "blocks"),
            image_size=16,
            batch_size=4,
            chunks=1,
            train_limit=16,
            test_limit=4,
            memory_format="contiguous",
            compress="decay:rate=0.5,steps=1,iterations=2",
        )
    )


def forward(job: Job, step: int, width: int) -> Forward:
    (info,) = job.parts.cut1
    encoder = StreamEncoder("none", gradient=False)
    encodings = encoder.encode({info.name: torch.zeros(4, 16, width)}, seed=derive_seed(0))
    message = chunk_message(encodings, [info.name], step, 0, backward=False)
    assert isinstance(message, Forward)
    return message


def test_step_that_is_aborted_does_not_count(address: str) -> None:
    job = narrowing_job()
    with Peer(address) as peer:
        peer.greet()
        peer.open(job.spec.to_map())
        for step in (1, 2, 3):
            peer.send(Begin(step=step, chunks=1, evaluate=False))
            peer.send(forward(job, step, 24))
            answer = peer.receive()
            assert isinstance(answer, Forward)
            assert answer.tensors[0]["shape"] == [4, 16, 24]
            peer.send(Abort(step=step, reason="a test"))


def test_width_that_is_not_yet_due_is_refused(address: str) -> None:
    job = narrowing_job()
    with Peer(address) as peer:
        peer.greet()
        peer.open(job.spec.to_map())
        peer.send(Begin(step=1, chunks=1, evaluate=False))
        peer.send(forward(job, 1, 12))
        error = peer.error()
        assert error.code == "corrupt_payload"
        assert "[4, 16, 24]" in error.message
