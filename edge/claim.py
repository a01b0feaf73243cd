"""A run's session on the server: asked for on every connection, until it has been had to its end."""

from common.spec import JobSpec
from edge.config import TrainConfig
from edge.link import Link
from edge.outcome import Outcome
from edge.run_folder import RunFolder, SessionKey
from wire.errors import PeerError, WireError
from wire.messages import Ready

_MOST_NAMED = 1024
"""Checkpoints that a resume message may name."""


class Claim:
    """What a run asks the server for.

    Args:
        config: of the run, which goes into its folder.
        key: the session of a run that goes on from its checkpoints; None for a new run.

    Attributes:
        remembers: what training has come to counts, and not only what was saved of it.
    """

    def __init__(self, config: TrainConfig, key: SessionKey | None) -> None:
        self._config = config
        self._key = key
        self._is_written = key is not None
        self._is_begun = True
        self.remembers = key is None

    async def ask(self, link: Link, spec: JobSpec, last: Outcome, folder: RunFolder | None) -> Ready:
        """Open the session, or resume it where it was asked for before, and write down what resuming takes.

        Args:
            link: a new connection.
            spec: the job.
            last: of the last step concluded here.
            folder: where checkpoints are; None for nowhere.

        Raises:
            PeerError: the server refuses.
            CheckpointFailed: the folder cannot be written.
        """
        if self._key is None:
            self._key, self._is_written = SessionKey.new(), False
            ready = await link.open(self._key, spec)
        else:
            saved = [] if folder is None else folder.steps
            self._is_begun = last.step > 0 or (not self.remembers and any(saved))
            ready = await link.resume(self._key, last if self.remembers else None, saved[-_MOST_NAMED:])
        # Not before: what the server has not taken is no run. But the answer to the first question may be lost.
        if folder is not None and ready.saves and not self._is_written:
            folder.write_settings(self._config, self._key)
            self._is_written = True
        return ready

    def begins_anew(self, error: WireError) -> bool:
        """Whether a connection failed because the server lacks the session, and nothing is lost by opening another.

        The next `ask` does that then.
        """
        is_lacking = isinstance(error, PeerError) and error.code in ("unknown_session", "no_common_step")
        if self._is_begun or not is_lacking:
            return False
        self._key, self.remembers = None, True
        return True
