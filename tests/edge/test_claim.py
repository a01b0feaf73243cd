"""Asking for a session, and what a run keeps of it: whatever answer is lost, there is a way to go on."""

import asyncio
import ssl
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.checkpoints import CheckpointFolder
from common.errors import CheckpointFailed, UserError
from edge.claim import Claim
from edge.config import TrainConfig
from edge.outcome import Outcome
from edge.progress import SilentProgress
from edge.run_folder import RunFolder, SessionKey, read_settings
from edge.saves import Saves
from edge.trainer import Trainer
from tests.wire.pair import SAMPLES, TOKEN
from wire.auth import REJOIN, REJOINED, is_proof, prove
from wire.config import WireConfig
from wire.errors import AuthenticationFailed, ConnectionLost, PeerError, RemoteProtocolError
from wire.messages import Ready, Rejoin, Saved

CONFIG = TrainConfig(server="nowhere:1")
WIRE = WireConfig()
READY: Any = replace(SAMPLES["ready"], step=0, need_weights=False, saves=True)  # type: ignore[type-var]


class Link:
    """Answers as it is told to: with what is ready, or an error."""

    connection = SimpleNamespace(welcome=SAMPLES["welcome"])

    def __init__(self, *answers: Ready | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    async def open(self, key: SessionKey, spec: Any) -> Ready:
        self.asked.append("open")
        return self._answer()

    async def resume(self, key: SessionKey, outcome: Outcome | None, saved: Sequence[int]) -> Ready:
        self.asked.append((outcome, list(saved)))
        return self._answer()

    def _answer(self) -> Ready:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_run_whose_first_answer_is_lost_can_be_gone_on_with(tmp_path: Path) -> None:
    async def ask() -> None:
        link: Any = Link(ConnectionLost("gone"), READY)
        folder = RunFolder(tmp_path / "run", keep=2)
        claim = Claim(CONFIG, None)
        with pytest.raises(ConnectionLost):
            await claim.ask(link, None, Outcome(), folder)  # type: ignore[arg-type]
        assert await claim.ask(link, None, Outcome(), folder) is READY  # type: ignore[arg-type]
        assert link.asked == ["open", (Outcome(), [])]
        read_settings(tmp_path / "run", {})

    run(ask())


@pytest.mark.parametrize("code", ["unknown_session", "no_common_step"])
@pytest.mark.parametrize("saved", [[], [0]])
def test_run_that_was_killed_before_it_had_come_to_anything_begins_anew(saved: list[int], code: str) -> None:
    async def ask() -> None:
        link: Any = Link(PeerError(code, "unknown"), READY)
        folder: Any = SimpleNamespace(
            steps=saved, came_to=max(saved, default=0), write_settings=lambda config, key: None
        )
        claim = Claim(CONFIG, SessionKey.new())
        assert not claim.remembers
        with pytest.raises(PeerError) as refused:
            await claim.ask(link, None, Outcome(), folder)  # type: ignore[arg-type]
        assert claim.begins_anew(refused.value)
        assert claim.remembers
        assert await claim.ask(link, None, Outcome(), folder) is READY  # type: ignore[arg-type]
        assert link.asked == [(None, saved), "open"]

    run(ask())


@pytest.mark.parametrize(("last", "saved", "resumed"), [(0, [0, 5], True), (3, [], False)])
def test_run_that_has_come_to_something_does_not(last: int, saved: list[int], resumed: bool) -> None:
    async def ask() -> None:
        link: Any = Link(READY, PeerError("unknown_session", "unknown"))
        folder: Any = SimpleNamespace(
            steps=saved, came_to=max(saved, default=0), write_settings=lambda config, key: None
        )
        claim = Claim(CONFIG, SessionKey.new() if resumed else None)
        await claim.ask(link, None, Outcome(), folder)  # type: ignore[arg-type]
        with pytest.raises(PeerError) as refused:
            await claim.ask(link, None, Outcome(last), folder)  # type: ignore[arg-type]
        assert not claim.begins_anew(refused.value)

    run(ask())


def test_run_whose_checkpoints_are_all_damaged_is_not_begun_anew() -> None:
    async def ask() -> None:
        link: Any = Link(PeerError("no_common_step", "the client has none"))
        claim = Claim(CONFIG, SessionKey.new())
        with pytest.raises(PeerError) as refused:
            await claim.ask(link, None, Outcome(), SimpleNamespace(steps=[], came_to=40))  # type: ignore[arg-type]
        assert not claim.begins_anew(refused.value)

    run(ask())


def test_no_more_checkpoints_are_named_than_a_message_holds() -> None:
    async def ask() -> None:
        link: Any = Link(READY)
        folder: Any = SimpleNamespace(steps=list(range(2000)), came_to=1999)
        await Claim(CONFIG, SessionKey.new()).ask(link, None, Outcome(), folder)  # type: ignore[arg-type]
        assert link.asked == [(None, list(range(976, 2000)))]

    run(ask())


def test_run_that_has_stopped_only_collects_once_the_link_is_back() -> None:
    async def use() -> None:
        trainer = Trainer(CONFIG, SilentProgress())
        stopped, calls = UserError("sample 3 is damaged"), []

        async def take_up(link: Any, resources: Any) -> None:
            calls.append("take up")

        async def train(link: Any) -> UserError:
            calls.append("train")
            return stopped

        async def collect(link: Any) -> dict[str, Any]:
            calls.append("collect")
            if calls.count("collect") == 1:
                raise ConnectionLost("gone")
            return {}

        trainer._take_up, trainer._train_until_stopped, trainer._collect = take_up, train, collect  # type: ignore
        with pytest.raises(ConnectionLost):
            await trainer._use(None, None)  # type: ignore[arg-type]
        assert await trainer._use(None, None) == (stopped, {})  # type: ignore[arg-type]
        assert calls == ["take up", "train", "collect", "take up", "collect"]

    run(use())


def test_going_back_that_the_link_is_lost_under_is_done_again() -> None:
    async def lose(step: int) -> None:
        raise ConnectionLost("gone")

    async def go_back() -> None:
        trainer = Trainer(CONFIG, SilentProgress())
        trainer._folder = SimpleNamespace(read=lose)  # type: ignore[assignment]
        with pytest.raises(ConnectionLost):
            await trainer._go_back(None, None, 5)  # type: ignore[arg-type]
        # What is here may be of both steps: the next connection has to bring it to one.
        assert not trainer._claim.remembers

    run(go_back())


def test_one_process_goes_on_with_a_run_at_a_time(tmp_path: Path) -> None:
    one, other = RunFolder(tmp_path, keep=2), RunFolder(tmp_path, keep=2)
    with one.claimed(), pytest.raises(UserError, match="another edge-client"), other.claimed():
        pass
    with other.claimed():
        pass


def test_training_goes_on_only_once_there_is_a_step_to_go_back_to(tmp_path: Path) -> None:
    async def save() -> None:
        folder = RunFolder(tmp_path, keep=2)
        saves = Saves(folder, 5, {}, pytest.fail)
        answers: dict[int, asyncio.Future[Saved]] = {}

        async def ask(step: int, keep: int) -> asyncio.Future[Saved]:
            answers[step] = asyncio.get_running_loop().create_future()
            return answers[step]

        async def answered(answer: asyncio.Future[Saved]) -> Saved:
            return await answer

        async def snapshot() -> dict[str, Any]:
            return {}

        link: Any = SimpleNamespace(save=ask, answered=answered)
        context: Any = SimpleNamespace(outcome=Outcome(0), snapshot=snapshot)
        saving = asyncio.create_task(saves.save(context, link))
        await asyncio.sleep(0.1)
        assert not saving.done()
        answers[0].set_result(Saved(0, ""))
        await saving
        assert folder.has_common
        context.outcome = Outcome(5)
        await saves.save(context, link)  # from now on, beside training
        answers[5].cancel()
        await saves.written()

    run(save())


async def claimed() -> tuple[Claim, Link]:
    """A claim that has had its first answer."""
    link = Link(READY)
    claim = Claim(CONFIG, None)
    await claim.ask(link, None, Outcome(), None)  # type: ignore[arg-type]
    return claim, link


def answer_to(claim: Claim, asked: Rejoin, **changes: Any) -> Ready:
    key = claim._key
    assert key is not None
    mac = prove(key.secret, REJOINED, asked.nonce, asked.mac)
    return replace(READY, **{"step": asked.step, "mac": mac, "ticket": bytes([1] * 32), **changes})


def test_ticket_is_good_for_one_connection() -> None:
    async def come_back() -> None:
        claim, link = await claimed()
        assert claim.come_back(Outcome(), WIRE) is None  # nothing to go on from
        assert (
            claim.come_back(Outcome(3), WIRE) is not None
        )  # which nobody could be told: there is no connection
        back = claim.come_back(Outcome(3, scale=0.5), WIRE)
        assert back is not None
        asked, welcome = back
        assert (asked.step, asked.applied, asked.scale) == (3, True, 0.5)
        assert welcome is link.connection.welcome
        key: Any = claim._key
        assert is_proof(asked.mac, key.secret, REJOIN, READY.ticket, asked.nonce, key.session)
        claim.spend()
        assert claim.come_back(Outcome(3), WIRE) is None
        claim.came_back(answer_to(claim, asked), link)  # type: ignore[arg-type]
        again = claim.come_back(Outcome(4), WIRE)
        assert again is not None
        assert is_proof(again[0].mac, key.secret, REJOIN, bytes([1] * 32), again[0].nonce, key.session)

    run(come_back())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"mac": None}, AuthenticationFailed),
        ({"mac": bytes(32)}, AuthenticationFailed),
        ({"step": 2}, RemoteProtocolError),
        ({"need_weights": True}, RemoteProtocolError),
    ],
)
def test_answer_that_is_not_of_the_session_ends_the_connection(
    changes: dict[str, Any], error: type[Exception]
) -> None:
    async def come_back() -> None:
        claim, link = await claimed()
        back = claim.come_back(Outcome(3), WIRE)
        assert back is not None
        with pytest.raises(error):
            claim.came_back(answer_to(claim, back[0], **changes), link)  # type: ignore[arg-type]

    run(come_back())


def test_run_that_goes_back_to_a_checkpoint_asks() -> None:
    async def come_back() -> None:
        claim, _ = await claimed()
        claim.remembers = False
        assert claim.come_back(Outcome(3), WIRE) is None

    run(come_back())


def test_nothing_is_said_to_whom_a_token_has_to_prove_before_it_is_proved() -> None:
    async def come_back() -> None:
        claim, _ = await claimed()
        assert claim.come_back(Outcome(3), WireConfig(token=TOKEN)) is None
        over_tls = WireConfig(token=TOKEN, tls=ssl.create_default_context())  # which the certificate proves
        assert claim.come_back(Outcome(3), over_tls) is not None

    run(come_back())


def test_checkpoint_is_there_though_an_older_one_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise CheckpointFailed("old checkpoints could not be removed")

    async def snapshot() -> dict[str, Any]:
        return {}

    async def save() -> None:
        monkeypatch.setattr(CheckpointFolder, "prune", fail)
        said: list[str] = []
        saves = Saves(RunFolder(tmp_path, keep=2), 5, {}, said.append)
        await saves._write(5, snapshot())
        assert said == ["old checkpoints could not be removed; training goes on"]
        assert saves.folder.steps == [5]

    run(save())
