"""What a newcomer tries first: the demo, and the README's Python example."""

import json
from pathlib import Path

import pytest

from tests.readme_commands import Block, marked_blocks
from tests.system.processes import run

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("--image-size", 32, "--batch-size", 16, "--chunks", 2, "--steps", 3, "--threads", 1),
    *("--train-limit", 48, "--test-limit", 16),
)


def test_demo_runs_a_server_of_its_own_that_knows_the_users_modules(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    model = ("--import", "dropout_model", "--model", "dropout_net", "--cut", "stem", "--cut", "blocks")
    ended = run("edge-client", "demo", "--cpu", *SMALL, *model, "--metrics", metrics)
    assert (ended.status, ended.err) == (0, ""), ended
    assert ended.out.startswith(
        "dropout_net on digits (48 training and 16 test samples, images of 32 px, 10 classes)"
    )
    assert "compress conv; the server computes on cpu" in ended.out
    assert "done: 3 steps, test accuracy " in ended.out
    summary = json.loads(metrics.read_text().splitlines()[-1])
    assert summary["steps"] == 3
    assert summary["compress_rate"] < 0.5


@pytest.fixture(scope="module")
def example() -> Block:
    """The README's Python example."""
    (block,) = [b for b in marked_blocks((ROOT / "README.md").read_text()) if b.language == "python"]
    return block


def test_python_example_is_short(example: Block) -> None:
    assert len([line for line in example.script.splitlines() if line.strip()]) <= 20


def test_python_example_trains(example: Block, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example.script, f"README.md:{example.line}", "exec"), {"__name__": "__main__"})
    figures, tensors = capsys.readouterr().out.splitlines()
    assert figures.startswith("6 steps, accuracy ")
    assert figures.endswith(" of the bytes")
    assert int(tensors.split()[0]) > 300
