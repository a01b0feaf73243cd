"""Noise and frames that are almost right, at a live server: each is answered by a typed error or the end.

`python -m benchmarks.faults fuzz` does the same at length.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.fault_runs import IMPORTS, TINY_JOB, Memory, differing, train_to_end
from benchmarks.fuzzing import Attack, targets_of
from benchmarks.intruder import Intruder, Refused, is_unfinished, record, record_with_return
from benchmarks.mutations import MUTATIONS, RealFrame
from tests.system.processes import Command, Ended, serving
from wire.protocol import Phase

SEED = 1
NOISE_BYTES, WARM_UP, FRAMES = 300_000, 150, 300
GROWTH_BYTES = 48 << 20
TOKEN = b"a token for the tests"
LIMITS = ("--max-sessions", 64, "--park-after", 3, "--forget-after", 6)


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

    def train(to: str, *others: object) -> Ended:
        ended = train_to_end(to, TINY_JOB, 6, 0, *guarded, "--save", saved, *others)
        assert ended.status == 0, ended
        return ended

    keeps = ("--checkpoint", tmp_path / "run", "--checkpoint-every", 1)
    attack = Attack(address, record_with_return(address, lambda to: train(to, *keeps)), SEED, token)
    expected = load_file(saved)
    attack.mutate(WARM_UP)
    with Memory(command) as memory:
        attack.noise(NOISE_BYTES)
        attack.mutate(FRAMES)
    findings = attack.findings
    assert not findings.faults, (SEED, findings)
    assert findings.noise_bytes >= NOISE_BYTES, (SEED, findings)
    assert findings.frames.total() >= WARM_UP + FRAMES, (SEED, findings)
    assert not attack.missed, (SEED, attack.missed, findings)
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


def test_every_kind_that_a_client_may_send_is_a_target_where_it_may_come() -> None:
    targets = targets_of(has_token=True)
    assert {(Phase.START, "hello"), (Phase.CHALLENGED, "proof"), (Phase.WELCOMED, "resume")} < set(targets)
    assert {(Phase.RUNNING, kind) for kind in ("begin", "forward", "abort", "save", "ping")} < set(targets)
    assert set(targets) - set(targets_of(has_token=False)) == {
        target for target in targets if target[0] is Phase.CHALLENGED
    }


def test_attack_without_real_frames_of_a_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="recorded: backward, begin, bye, commit"):
        Attack("127.0.0.1:1", [FRAME])


def test_beginning_of_a_frame_is_unfinished_and_a_whole_or_broken_one_is_not() -> None:
    whole = FRAME.encode()
    assert is_unfinished(whole[:-1])
    assert is_unfinished(whole + whole[:30])
    assert not is_unfinished(whole + whole)
    assert not is_unfinished(whole + b"X" + whole)


def test_wrong_token_is_refused_and_a_right_one_is_not(
    server: tuple[Command, str], token: bytes | None, guarded: tuple[object, ...]
) -> None:
    """What the attack behind a token stands on."""
    frames = record(server[1], lambda to: train_to_end(to, TINY_JOB, 2, 0, *guarded))
    draw = random.Random(SEED)
    with Intruder(server[1], frames, draw, token) as intruder:
        intruder.greet()
        intruder.open()
    if token is not None:
        with Intruder(server[1], frames, draw, b"wrong") as intruder, pytest.raises(Refused):
            intruder.greet()
