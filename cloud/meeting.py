"""Where client and server go on after they have lost each other: a pure decision over step numbers.

::

    the client's last step is     the server                              both go on
    ──────────────────────────    ────────────────────────────────────    ──────────────────────────────
    the server's last             undoes what is pending                  as they are
    the one after, applied        has it pending: applies it              as they are
    the one after, dropped        drops it                                as they are
    any other, or not known       has a checkpoint, as the client has     from the newest that both have

The client concludes a step before it tells the server, so the server is never ahead of a client that has
forgotten nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Meeting:
    """What was decided.

    Attributes:
        step: both go on after it.
        remembered: the client goes on as it is; else from its checkpoint.
        stored: the server goes on from its checkpoint; else as it is.
    """

    step: int
    remembered: bool
    stored: bool


def meet(
    client: int | None,
    client_saved: Iterable[int],
    *,
    applied: bool,
    concluded: int | None,
    pending: int | None,
    saved: Iterable[int],
) -> Meeting | None:
    """Decide.

    Args:
        client: the last step that the client has concluded; None where it remembers none.
        client_saved: steps that it has checkpoints of.
        applied: whether it applied its last step, rather than dropping it.
        concluded: the last step that the server has concluded; None where it holds none in memory.
        pending: the step after, where it only lacks the client's word.
        saved: steps that the server has checkpoints of.

    Returns:
        Where to go on, or None where there is no step that both can go back to.
    """
    if client is not None and concluded is not None:
        is_next = client == concluded + 1 and (pending == client or not applied)
        if is_next or client == concluded:
            return Meeting(client, remembered=True, stored=False)
    common = set(saved)
    if client is not None and client in common:
        return Meeting(client, remembered=True, stored=True)
    common &= set(client_saved)
    return Meeting(max(common), remembered=False, stored=True) if common else None
