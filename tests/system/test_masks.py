"""Tokens that a mask rules out: they need not cross, and the mask itself crosses once, as bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import masked_model  # noqa: F401  (registers its model here too)
from common.weights import load_state
from edge.config import TrainConfig
from edge.job import Job, prepare
from tests.system.peer import Peer
from tests.system.processes import Command, assert_serves, events, run, serving, train
from wire.codecs.base import Facts
from wire.messages import Backward, Begin, Forward
from wire.streams import IDS, StreamEncoder, chunk_message, facts_of

MASKED = (
    *("--import", "masked_model", "--model", "masked_net", "--cut", "embed", "--cut", "second"),
    *("--image-size", "16", "--batch-size", "8", "--chunks", "2", "--threads", "1", "--eval-every", "3"),
    *("--train-limit", "64", "--test-limit", "8", "--memory-format", "contiguous"),
)
BATCH, TOKENS, WIDTH = 8, 256, 16


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Command, str]]:
    with serving("--import", "masked_model", "--import", "dropout_model") as started:
        yield started
        command, address = started
        assert_serves(address)
        assert "Traceback" not in command.err


@pytest.fixture
def address(server: tuple[Command, str]) -> str:
    return server[1]


def trained(address: str, folder: Path, *arguments: object) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    saved, metrics = folder / "model.safetensors", folder / "metrics.jsonl"
    ended = run(
        "edge-client", "--server", address, *MASKED, *arguments, "--save", saved, "--metrics", metrics
    )
    assert (ended.status, ended.err) == (0, ""), ended
    return events(metrics), load_state(saved)


def figures(lines: list[dict[str, Any]]) -> list[Any]:
    return [(line["loss"], line.get("accuracy")) for line in lines if line["event"] in ("step", "eval")]


def test_leaving_padding_out_changes_no_bit_of_training(address: str, tmp_path: Path) -> None:
    plain, expected = trained(address, tmp_path, "--steps", 6, "--no-ragged")
    ragged, state = trained(address, tmp_path, "--steps", 6, "--compress", "ragged")
    assert figures(ragged) == figures(plain)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert ragged[-1]["compress_rate"] < 0.6 * plain[-1]["compress_rate"]


def test_mask_crosses_once_a_chunk_and_a_bit_a_token(address: str, tmp_path: Path) -> None:
    lines, _ = trained(address, tmp_path, "--steps", 4, "--no-ragged", "--eval-every", 0)
    dense = BATCH * TOKENS * WIDTH * 4
    up, down = (
        sum(line[key] for line in lines if line["event"] == "step") for key in ("up_bytes", "down_bytes")
    )
    headers = 4 * 2 * 2 * 400
    assert 0 < up - 4 * 2 * dense - 4 * BATCH * TOKENS / 8 < headers
    assert 0 < down - 4 * 2 * dense < headers


@pytest.mark.parametrize(
    "spec",
    ["ragged+int8", "ragged+lowrank:4+int8", "ragged+topk:0.3+zstd", "act=ragged+delta:limit=16M+int4"],
)
def test_what_is_left_may_be_compressed_further(address: str, tmp_path: Path, spec: str) -> None:
    compress = ("--compress", spec, "--no-augment", "--train-limit", 16)
    first, _ = trained(address, tmp_path, "--steps", 6, *compress)
    again, _ = trained(address, tmp_path, "--steps", 6, *compress)
    assert figures(first) == figures(again)
    plain, _ = trained(address, tmp_path, "--steps", 6, "--no-ragged", *compress[2:])
    assert figures(first)[-1][0] == pytest.approx(figures(plain)[-1][0], rel=0.05)
    assert first[-1]["compress_rate"] < 0.7


def test_ragged_where_nothing_is_padding_is_refused(address: str) -> None:
    ended = train(address, "--compress", "ragged+int8", "--steps", 1)
    assert ended.status == 2
    assert "--compress ragged does nothing at cut 1" in ended.error


# Peers whose masks and ids are wrong.


@pytest.fixture(scope="module")
def job() -> Job:
    """A job of two chunks of four samples a step."""
    return prepare(
        TrainConfig(
            server="nowhere:1",
            model="masked_net",
            cuts=("embed", "second"),
            image_size=16,
            batch_size=8,
            chunks=2,
            train_limit=16,
            test_limit=4,
            compress="ragged+delta:limit=1M+int4",
            augment=False,
            memory_format="contiguous",
        )
    )


@pytest.fixture
def opened(address: str, job: Job) -> Iterator[Peer]:
    with Peer(address) as peer:
        peer.greet()
        peer.open(job.spec.to_map())
        peer.send(Begin(1, 2, False))
        yield peer


def chunk(job: Job, **changes: Tensor | None) -> dict[str, Tensor]:
    """The tensors of a chunk, ids first; None leaves one out."""
    hidden, mask = "hidden", "mask"
    kept = torch.arange(TOKENS) < torch.tensor([[9], [250], [31], [1]])
    named = {"ids": torch.arange(4), mask: kept, hidden: torch.ones(4, TOKENS, WIDTH), **changes}
    names = {"ids": IDS}
    for info in job.parts.cut1:
        names[mask if info.dtype == torch.bool else hidden] = info.name
    order = ["ids", *(mask if info.dtype == torch.bool else hidden for info in job.parts.cut1)]
    return {names[what]: tensor for what in order if (tensor := named[what]) is not None}


def forward(job: Job, facts: Facts | None = None, **changes: Tensor | None) -> Forward:
    tensors = chunk(job, **changes)
    encoder = StreamEncoder(job.spec.codecs["cut1.act"], gradient=False)
    encodings = encoder.encode(tensors, seed=0, facts=facts_of(tensors) if facts is None else facts)
    return chunk_message(encodings, list(tensors), 1, 0, backward=False)  # type: ignore[return-value]


def test_chunk_as_it_should_be_is_answered(opened: Peer, job: Job) -> None:
    opened.send(forward(job))
    answer = opened.receive()
    assert isinstance(answer, Forward)
    assert answer.tensors[0]["codec"] == "ragged"
    assert answer.tensors[0]["parts"][0]["shape"] == [1, 291, WIDTH]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no ids": ({"ids": None}, "a forward message carries"),
    "too few ids": ({"ids": torch.arange(3)}, "a chunk of 4 samples came with 3 sample ids"),
    "too many ids": ({"ids": torch.arange(8), "facts": Facts()}, "in such a chunk"),
    "negative ids": ({"ids": torch.tensor([0, 1, -2, 3]), "facts": Facts()}, "the sample ids came as"),
    "ids that are no integers": ({"ids": torch.rand(4), "facts": Facts()}, "the sample ids came as"),
    "a million ids": ({"ids": torch.arange(1 << 20), "facts": Facts()}, "not one of sizes up to"),
    "a mask of other samples": (
        {"mask": torch.ones(3, TOKENS, dtype=torch.bool)},
        "this chunk of it is torch.float32 [3",
    ),
    "a mask of other tokens": ({"mask": torch.ones(4, TOKENS - 1, dtype=torch.bool)}, "bool"),
    "a mask of numbers": ({"mask": torch.ones(4, TOKENS)}, "float32"),
    "no mask": ({"mask": None}, "a forward message carries"),
    "tokens of another mask": (
        {"facts": Facts(ids=(0, 1, 2, 3), kept=torch.arange(TOKENS) < torch.tensor([[8], [250], [31], [1]]))},
        "delta never takes activations of torch.float32, [1, 290, 16], in such a chunk",
    ),
}


@pytest.mark.parametrize(("changes", "says"), WRONG.values(), ids=WRONG)
def test_chunk_that_is_not_what_it_says_ends_with_a_typed_error(
    opened: Peer, job: Job, changes: dict[str, Any], says: str
) -> None:
    opened.send(forward(job, **changes))
    error = opened.error()
    assert error.code == "corrupt_payload", error
    assert says in error.message, error


def test_gradient_of_tokens_that_the_chunk_does_not_have_is_corrupt(opened: Peer, job: Job) -> None:
    opened.send(forward(job))
    assert isinstance(opened.receive(), Forward)
    encoder = StreamEncoder(job.spec.codecs["cut2.grad"], gradient=True)
    kept = torch.arange(TOKENS) < torch.tensor([[9], [250], [31], [2]])
    names = [info.name for info in job.parts.cut2]
    encodings = encoder.encode({names[0]: torch.ones(4, TOKENS, WIDTH)}, seed=0, facts=Facts(kept=kept))
    message = chunk_message(encodings, names, 1, 0, backward=True)
    assert isinstance(message, Backward)
    opened.send(message)
    error = opened.error()
    assert error.code == "corrupt_payload", error
    assert "not what ragged makes" in error.message
