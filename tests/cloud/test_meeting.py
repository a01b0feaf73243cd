"""Where client and server go on: the decision's table, and a model of all the ways to lose each other."""

from hypothesis import given
from hypothesis import strategies as st

from cloud.meeting import Meeting, meet

STEPS = st.integers(0, 6)
SAVED = st.sets(STEPS)


def test_both_at_the_same_step_go_on_as_they_are() -> None:
    assert meet(5, [], applied=True, concluded=5, pending=None, saved=[]) == Meeting(5, True, False)


def test_pending_step_that_the_client_has_not_concluded_is_undone() -> None:
    assert meet(5, [], applied=True, concluded=5, pending=6, saved=[5]) == Meeting(5, True, False)


def test_pending_step_that_the_client_has_applied_is_applied() -> None:
    assert meet(6, [], applied=True, concluded=5, pending=6, saved=[]) == Meeting(6, True, False)


def test_step_that_the_client_has_dropped_is_dropped_whether_it_came_through_or_not() -> None:
    for pending in (None, 6):
        assert meet(6, [], applied=False, concluded=5, pending=pending, saved=[]) == Meeting(6, True, False)


def test_step_that_the_server_has_lost_sends_both_to_the_newest_common_checkpoint() -> None:
    assert meet(6, [2, 4, 6], applied=True, concluded=5, pending=None, saved=[1, 2, 4]) == Meeting(
        4, False, True
    )


def test_client_that_remembers_a_step_goes_on_where_the_server_has_saved_just_that() -> None:
    assert meet(4, [2], applied=True, concluded=None, pending=None, saved=[2, 4]) == Meeting(4, True, True)


def test_client_that_remembers_nothing_goes_to_its_newest_checkpoint_that_the_server_has() -> None:
    assert meet(None, [2, 4], applied=True, concluded=7, pending=8, saved=[2, 4, 6]) == Meeting(
        4, False, True
    )


def test_no_step_in_common_is_said() -> None:
    assert meet(None, [2], applied=True, concluded=7, pending=None, saved=[4]) is None
    assert meet(9, [], applied=True, concluded=None, pending=None, saved=[]) is None


@given(st.none() | STEPS, SAVED, st.booleans(), st.none() | STEPS, st.booleans(), SAVED)
def test_what_is_decided_can_be_done(
    client: int | None,
    mine: set[int],
    applied: bool,
    concluded: int | None,
    is_pending: bool,
    saved: set[int],
) -> None:
    pending = concluded + 1 if is_pending and concluded is not None else None
    meeting = meet(client, mine, applied=applied, concluded=concluded, pending=pending, saved=saved)
    if meeting is None:
        assert not mine & saved
        assert client is None or client not in saved
        return
    # Either side gets there from what it holds.
    assert meeting.remembered == (meeting.step == client) or meeting.step in mine
    if not meeting.remembered:
        assert meeting.step in mine
    if meeting.stored:
        assert meeting.step in saved
    else:
        assert concluded is not None
        assert meeting.step == concluded or (meeting.step == pending or not applied)
    # Nothing that both still have is given up.
    if client is not None and client == concluded:
        assert meeting == Meeting(client, True, False)
    if not meeting.remembered:
        assert meeting.step == max(mine & saved)
