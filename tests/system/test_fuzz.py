"""Noise and frames that are almost right, at a live server: each is answered by a typed error or the end.

`python -m benchmarks.faults fuzz` does the same at length.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.fault_runs import IMPORTS, JOBS, Memory, differing, train_to_end
from benchmarks.fuzzing import Attack, Intruder, Refused, record
from benchmarks.mutations import MUTATIONS, RealFrame
from tests.system.processes import Command, Ended, serving

SEED = 1
NOISE_BYTES, WARM_UP, FRAMES = 300_000, 150, 300
GROWTH_BYTES = 48 << 20
TOKEN = b"a token for the tests"
JOB = JOBS["conv+int8"]
LIMITS = ("--max-sessions", 64, "--park-after", 1, "--forget-after", 2)


@pytest.fixture(params=[None, TOKEN], ids=["without a token", "behind a token"])
def token(request: pytest.FixtureRequest) -> bytes | None:
    return request.param


@pytest.fixture
def guarded(token: bytes | None, tmp_path: Path) -> tuple[object, ...]:
    if token is None:
        return ()
    (tmp_path / "token").write_bytes(token)
    return ("--token-file", tmp_path / "token")


@pytest.fixture
def server(guarded: tuple[object, ...], tmp_path: Path) -> Iterator[tuple[Command, str]]:
    with serving(*IMPORTS, *LIMITS, "--state-dir", tmp_path / "state", *guarded) as started:
        yield started


def test_server_outlives_noise_and_mutated_frames_and_trains_the_next_client(
    server: tuple[Command, str], token: bytes | None, guarded: tuple[object, ...], tmp_path: Path
) -> None:
    command, address = server
    saved = tmp_path / "model.safetensors"

    def train(to: str) -> Ended:
        ended = train_to_end(to, JOB, 4, 0, *guarded, "--save", saved)
        assert ended.status == 0, ended
        return ended

    attack = Attack(address, record(address, train), SEED, token)
    expected = load_file(saved)
    attack.mutate(WARM_UP)
    with Memory(command) as memory:
        attack.noise(NOISE_BYTES)
        attack.mutate(FRAMES)
    findings = attack.findings
    assert not findings.faults, (SEED, findings)
    assert findings.frames > 0.8 * (WARM_UP + FRAMES), (SEED, findings)
    # All layers have been reached: frames, headers, payloads, and the order of messages.
    assert {"bad_frame", "limit_exceeded", "bad_header", "corrupt_payload", "protocol_error"} <= set(
        findings.errors
    ), (SEED, findings)
    train(address)
    assert not differing(expected, load_file(saved))
    assert memory.after - memory.before < GROWTH_BYTES
    assert "Traceback" not in command.err, command.err[command.err.index("Traceback") - 300 :][:3000]


FRAME = RealFrame(
    {"kind": "forward", "step": 1, "chunk": 0, "names": ["a"], "tensors": [{"size": 64, "shape": [4, 4]}]},
    bytes(64),
)


@pytest.mark.parametrize("mutation", sorted(set(MUTATIONS), key=lambda one: one.__name__))
def test_mutation_is_a_pure_function_of_its_randomness_and_changes_something(mutation) -> None:
    others = [RealFrame({"kind": "bye", "reason": "done"}, b""), FRAME]
    made = [mutation(random.Random(seed), FRAME, others) for seed in range(20)]
    assert made == [mutation(random.Random(seed), FRAME, others) for seed in range(20)]
    assert any(one != FRAME.encode() for one in made)


def test_wrong_token_is_refused_and_a_right_one_is_not(
    server: tuple[Command, str], token: bytes | None, guarded: tuple[object, ...]
) -> None:
    """What the attack behind a token stands on."""
    frames = record(server[1], lambda to: train_to_end(to, JOB, 2, 0, *guarded))
    draw = random.Random(SEED)
    with Intruder(server[1], frames, draw, token) as intruder:
        intruder.greet()
        intruder.open()
    if token is not None:
        with Intruder(server[1], frames, draw, b"wrong") as intruder, pytest.raises(Refused):
            intruder.greet()
