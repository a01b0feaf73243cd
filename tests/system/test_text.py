"""Text encoders over a real link: bitwise as unsplit training by a plain loop, and saved for them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from common.seeding import derive_seed
from common.text_models import transformers
from edge.config import TrainConfig
from edge.data.draws import epoch_order
from edge.data.text import open_text
from edge.trainer import train
from tests.system.conftest import CloudServer
from tests.system.processes import run, serving
from tests.tiny_text import OTHERS, write_cola, write_model

# The first module of each part that draws random numbers, or comes before one that does.
PARTS = {
    "bert": {
        "front": "bert.embeddings",
        "middle": "bert.encoder.layer.0.intermediate",
        "back": "bert.pooler",
    },
    "roberta": {
        "front": "roberta.embeddings",
        "middle": "roberta.encoder.layer.0.intermediate",
        "back": "classifier",
    },
    "distilbert": {
        "front": "distilbert.embeddings",
        "middle": "distilbert.transformer.layer.0.ffn",
        "back": "pre_classifier",
    },
}


def config_of(tmp_path: Path, server: str, kind: str = "bert", **changes) -> TrainConfig:
    settings = {
        "model": write_model(tmp_path / "model", kind, weights=True),
        "data": write_cola(tmp_path / "cola"),
        "batch_size": 10,
        "chunks": 3,
        "steps": 6,
        "lr": 1e-2,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "max_length": 16,
        "threads": 1,
        "metrics": tmp_path / "metrics.jsonl",
        **changes,
    }
    return TrainConfig(server=server, **settings)


def train_unsplit(config: TrainConfig, kind: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """A plain loop over transformers' model and tokenizer."""
    torch.set_num_threads(1)
    library = transformers()
    folder = config.model.removeprefix("hf:")
    model = library.AutoModelForSequenceClassification.from_pretrained(folder).train()
    tokenizer = library.AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    rates = [1 / 2, 1, 1, 3 / 4, 1 / 2, 1 / 4]  # two steps of warm-up, then linear to nothing
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*rates, 0.0][step])
    place = {"step": 0, "chunk": 0}
    for part, module in PARTS[kind].items():
        model.get_submodule(module).register_forward_pre_hook(
            lambda *_, part=part: (
                torch.manual_seed(derive_seed(config.seed, place["step"], place["chunk"], part)) and None
            )
        )
    source = open_text(config.data, seed=config.seed, train_limit=None, test_limit=None).train
    ids = [
        order[first : first + config.batch_size]
        for order in (epoch_order(len(source), config.seed, epoch) for epoch in range(config.steps))
        for first in range(0, len(source), config.batch_size)
    ]
    losses = []
    for step, batch in enumerate(ids[: config.steps], 1):
        total = 0.0
        labels = torch.from_numpy(source.labels[batch])
        sentences = [source.sentences[i] for i in batch]
        size = -(-len(batch) // config.chunks)
        for chunk, first in enumerate(range(0, len(batch), size)):
            place.update(step=step, chunk=chunk)
            y = labels[first : first + size]
            given = tokenizer(
                sentences[first : first + size],
                padding="longest" if config.padding == "longest" else "max_length",
                pad_to_multiple_of=8 if config.padding == "longest" else None,
                truncation=True,
                max_length=config.max_length,
                return_tensors="pt",
            )
            names = ("input_ids", "attention_mask", "token_type_ids")[: 3 if kind == "bert" else 2]
            loss = cross_entropy(model(**{name: given[name] for name in names}).logits, y)
            (loss * (len(y) / len(labels))).backward()
            total += loss.item() * len(y)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total / len(labels))
    return losses, model.state_dict()


def steps_of(path: Path) -> list[dict[str, float]]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["event"] == "step"]


@pytest.mark.parametrize("padding", ["longest", "max"])
@pytest.mark.parametrize("kind", PARTS)
def test_text_trains_as_if_unsplit(
    cloud_server: CloudServer, tmp_path: Path, kind: str, padding: str
) -> None:
    config = config_of(tmp_path, cloud_server.address, kind, padding=padding)
    result = train(config)
    losses, state = train_unsplit(config, kind)
    assert [line["loss"] for line in steps_of(tmp_path / "metrics.jsonl")] == losses
    assert result.state.keys() == state.keys()
    for name, expected in state.items():
        assert torch.equal(result.state[name], expected), name


@pytest.mark.parametrize("kind", OTHERS)
def test_padding_crosses_where_a_model_looks_at_it(
    cloud_server: CloudServer, tmp_path: Path, kind: str
) -> None:
    """MPNet's bias by relative position, `[B, heads, S, S]`, is no `[B, S, ...]`, even with as many heads as tokens."""
    heads = OTHERS[kind]["num_attention_heads"]
    config = config_of(tmp_path, cloud_server.address, kind, steps=3, max_length=heads)
    losses = []
    for ragged in (True, False):
        train(replace(config, ragged=ragged))
        losses.append([line["loss"] for line in steps_of(tmp_path / "metrics.jsonl")])
    assert losses[0] == losses[1]


def test_the_saved_model_loads_into_plain_transformers(tmp_path: Path) -> None:
    config = config_of(tmp_path, "127.0.0.1:1")
    saved = tmp_path / "model.safetensors"
    options = ("--steps", 2, "--batch-size", 8, "--chunks", 2, "--max-length", 16, "--threads", 1)
    with serving("--threads", 1) as (_, address):
        client = run(
            *("edge-client", "--server", address, "--model", config.model, "--data", config.data),
            *("--save", saved, *options),
        )
    assert client.status == 0, client.err
    assert "Matthews correlation" in client.out
    library = transformers()
    plain = library.AutoModelForSequenceClassification.from_config(
        library.AutoConfig.from_pretrained(config.model.removeprefix("hf:"))
    )
    plain.load_state_dict(load_file(saved), strict=True)
