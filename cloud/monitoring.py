"""What a server tells those who watch over it: Prometheus metrics, and whether it is well.

Each server has a registry of its own, so that two in one process do not mix. Counting is cheap and may be done in any
thread. Nothing that a client sends becomes a label: their number stays what it is here.
"""

import json
import time
from importlib import metadata

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

REFUSALS = ("capacity", "authentication", "rate", "memory", "job", "protocol", "draining")
"""Why a client is refused; any other reason counts as ``other``."""

RESUMES = ("memory", "checkpoint")
"""Where a session that goes on had been kept."""

_STEP_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_WRITE_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)


class Monitor:
    """The metrics of one server. Every name begins with ``isthmus_``.

    Args:
        device: what it computes on, for the build information.
    """

    def __init__(self, device: str = "") -> None:
        self.registry = CollectorRegistry()
        self._began_s = time.monotonic()
        self._draining = False
        self._sessions = {"active": 0, "parked": 0}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"isthmus_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"isthmus_{name}", text, registry=self.registry, buckets=buckets)

        self._session_gauge = Gauge(
            "isthmus_sessions", "Sessions by state", ["state"], registry=self.registry
        )
        self._draining_gauge = Gauge(
            "isthmus_draining", "1 while the server finishes and takes nobody in", registry=self.registry
        )
        self._connections = counter("connections", "Connections taken")
        self._refused = counter("refused", "Clients refused by reason", "reason")
        self._auth_failures = counter("authentication_failures", "Clients that did not know the token")
        self._steps = counter("steps", "Training steps applied")
        self._step_s = histogram("step_seconds", "Time from a step's begin to its commit", _STEP_S)
        self._received = counter("received_bytes", "Bytes received from clients, on the socket")
        self._sent = counter("sent_bytes", "Bytes sent to clients, on the socket")
        self._compute_s = counter("compute_seconds", "Time that the device computed for sessions")
        self._writes = counter("checkpoint_writes", "Checkpoints written by result", "result")
        self._write_s = histogram("checkpoint_write_seconds", "Time to write a checkpoint", _WRITE_S)
        self._resumes = counter("resumes", "Sessions that went on, by where they had been kept", "source")
        # A series that is there before anything happens tells nothing happened from nothing known.
        for reason in (*REFUSALS, "other"):
            self._refused.labels(reason)
        for result in ("ok", "failed"):
            self._writes.labels(result)
        for source in RESUMES:
            self._resumes.labels(source)
        self.set_sessions(active=0, parked=0)
        Info("isthmus_build", "What runs here", registry=self.registry).info(
            {"version": _version(), "torch": _version("torch"), "device": device}
        )
        ProcessCollector(registry=self.registry)

    def connected(self) -> None:
        """A connection was taken."""
        self._connections.inc()

    def refused(self, reason: str) -> None:
        """A client was refused, for one of `REFUSALS`."""
        self._refused.labels(reason if reason in REFUSALS else "other").inc()

    def authentication_failed(self) -> None:
        """A client did not know the token."""
        self._auth_failures.inc()

    def set_sessions(self, *, active: int, parked: int) -> None:
        """Tell how many sessions there are: connected ones, and those on disk."""
        self._sessions = {"active": active, "parked": parked}
        for state, number in self._sessions.items():
            self._session_gauge.labels(state).set(number)

    def stepped(self, seconds: float) -> None:
        """A training step was applied, so long after it had begun."""
        self._steps.inc()
        self._step_s.observe(seconds)

    def transferred(self, *, received: int = 0, sent: int = 0) -> None:
        """So many more bytes crossed a socket."""
        self._received.inc(received)
        self._sent.inc(sent)

    def computed(self, seconds: float) -> None:
        """The device computed for so much longer."""
        self._compute_s.inc(seconds)

    def checkpoint_written(self, seconds: float, *, ok: bool) -> None:
        """Writing a checkpoint took so long, and did or did not succeed."""
        self._writes.labels("ok" if ok else "failed").inc()
        self._write_s.observe(seconds)

    def resumed(self, source: str) -> None:
        """A session went on, kept until then in one of `RESUMES`."""
        assert source in RESUMES, source
        self._resumes.labels(source).inc()

    def drain(self) -> None:
        """The server finishes what is under way and takes nobody in any more."""
        self._draining = True
        self._draining_gauge.set(1)

    def metrics(self) -> tuple[str, bytes]:
        """Return the content type and the text of all metrics, in Prometheus' format."""
        return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self.registry)

    def health(self) -> tuple[bool, bytes]:
        """Return whether clients are welcome, and the same with some numbers as JSON."""
        state = {
            "status": "draining" if self._draining else "ok",
            "sessions": self._sessions["active"],
            "parked": self._sessions["parked"],
            "uptime_s": round(time.monotonic() - self._began_s, 3),
            "version": _version(),
        }
        return not self._draining, json.dumps(state).encode() + b"\n"


def _version(package: str = "isthmus") -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
