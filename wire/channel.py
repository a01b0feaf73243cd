"""What lies between a protocol and a byte stream: queues, flow control, and how a connection ends.

A `Channel` is told what happens to the stream (bytes came, the kernel has room again, the stream ended, time
has passed) and tells the stream what to do. It knows no event loop: that gives it the stream, the waiters
and the timer.

Both queues are bounded. `wire.sender` decides what is sent next. When too many received messages wait in
`wire.inbox`, the stream is not read until some are taken, so that TCP slows the peer. `wire.watch` ends it with
peers that are too slow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from wire.config import WireConfig
from wire.errors import ConnectionLost, WireError
from wire.inbox import Inbox
from wire.loop import Stream, Timer, Waiter, wake
from wire.messages import Backward, Bye, Error, Forward, Message
from wire.outbox import ENDLESS, SendReceipt
from wire.protocol import Phase, Protocol, Role
from wire.sender import Sender, Traits
from wire.sockets import explain_loss
from wire.watch import Watch

__all__ = ["Channel"]

_MAX_URGENT = 256  # unsent heartbeats; a peer that causes more of them floods us


class Channel:
    """The queues of one end of a connection, and its end.

    Args:
        role: which end this is.
        config: settings.
        new_waiter: makes something to wait on.
        call_later: calls a function after so many seconds.
        opened: is woken when the connection is established, or has failed.
        lost: is woken when the stream has ended.

    Attributes:
        protocol: the protocol's state.
        failure: why nothing more is sent or received; None while all is well.
    """

    def __init__(
        self,
        role: Role,
        config: WireConfig,
        new_waiter: Callable[[], Waiter],
        call_later: Callable[[float, Callable[[], None]], Timer],
        opened: Waiter,
        lost: Waiter,
    ) -> None:
        self.protocol = Protocol(role, config)
        self.failure: WireError | None = None
        self._inbox = Inbox(config.receive_queue, new_waiter, call_later)
        self._watch = Watch(config)
        self._opened, self._lost = opened, lost
        self._config = config
        self._new_waiter = new_waiter
        self._call_later = call_later
        self._stream: Stream
        self._sender = Sender(lambda: call_later(0, self._pump), lead=ENDLESS if role is Role.SERVER else 0)
        self._sent_bytes = 0  # once the stream has ended
        self._senders: deque[Waiter] = deque()
        self._timer: Timer | None = None
        self._beating = self._finishing = False

    # What the application wants.

    @property
    def sent_bytes(self) -> int:
        """Bytes that the kernel took."""
        return self._sent_bytes if self._lost.done() else self._sender.sent_bytes

    @property
    def bytes_per_s(self) -> float | None:
        """How fast the link takes what is sent; None where that is not known yet."""
        return self._sender.pace.bytes_per_s

    @property
    def full(self) -> bool:
        """Too many messages wait to be sent."""
        return self._sender.waiting >= self._config.send_queue and self.failure is None

    @property
    def busy(self) -> bool:
        """A message is on its way, here or there."""
        return self.protocol.arriving or not self._sender.idle

    def lead(self, chunks: int) -> None:
        """Let activations that are sent from now on be ahead of gradients by so many chunks, see `wire.outbox`."""
        self._sender.lead(chunks)

    def queue(self, message: Message) -> SendReceipt:
        """Queue a message to be sent, and send it if it can be."""
        buffers, size = self.protocol.send(message)
        receipt = SendReceipt(buffers, size, self._new_waiter)
        # Of tuples, here and in wire.protocol: a union would be made anew for every message.
        chunk = message.chunk if isinstance(message, (Forward, Backward)) else 0
        self._sender.push(message.kind, receipt, chunk)
        self._pumped()
        return receipt

    async def room(self) -> None:
        """Wait until the queue is not full, or the connection has failed."""
        while self.full:
            waiter = self._new_waiter()
            self._senders.append(waiter)
            await waiter

    @property
    def inbox(self) -> deque[Message]:
        """Messages received and not yet taken."""
        return self._inbox.messages

    async def arrival(self) -> None:
        """Wait until a message has come, or the connection has failed.

        Raises:
            LocalProtocolError: somebody waits already.
        """
        await self._inbox.arrival()

    def take(self) -> Message:
        """Remove and return the oldest message received; IndexError where there is none."""
        return self._inbox.take(self._stream)

    def leave(self, message: Message, failure: WireError) -> None:
        """End because this end wants to: with bye after everything that is queued, or with an error in its place."""
        if self.failure is None:
            if isinstance(message, Error):
                self._sender.drop_waiting(failure)
            self.queue(message)
            self.end(failure)
            self._inbox.clear(self._stream)
            self._finish()

    def abort(self, failure: WireError) -> None:
        """End at once, dropping everything that is queued."""
        self.end(failure)
        self._sender.drop(self.failure)
        self._stream.abort()

    # What happens to the stream.

    def attach(self, stream: Stream, traits: Traits) -> None:
        """Begin: the stream is connected; `greet` once it carries bytes.

        Args:
            stream: it has to call `pause_writing` as soon as it buffers anything.
            traits: what it is like.
        """
        self._stream = stream
        self._sender.attach(stream, traits)
        self._after(self._config.handshake_s, self._handshake_expired)

    def greet(self) -> None:
        """Say hello or rejoin, where this end is the one that begins."""
        self.received(0)

    def received(self, nbytes: int) -> None:
        """Bytes came into `protocol.next_buffer`."""
        protocol = self.protocol
        protocol.advance(nbytes)
        try:
            while (message := protocol.next_message()) is not None:
                self.inbox.append(message)
                if type(message) is Bye:
                    self.broken(ConnectionLost(f"the peer said bye: {message.reason}"))
        except WireError as error:
            self._break(error)
        if protocol.replies:
            self._send_replies()
        if not self._beating and protocol.established:
            wake(self._opened)
            self._beat()
        self._watch.received(arriving=protocol.arriving)
        self._inbox.arrived(self._stream, nbytes, protocol.missing)

    def received_eof(self) -> None:
        """The peer sends nothing more."""
        self.broken(self.protocol.receive_eof())

    def broken(self, failure: WireError) -> None:
        """Nothing more comes that is of use; the stream closes when it has sent what it has."""
        self.end(failure)
        self._sender.drop(self.failure)
        self._finish()

    def pause_writing(self) -> None:
        """The stream buffers some of what it was given."""
        self._sender.paused = True

    def resume_writing(self) -> None:
        """The stream buffers nothing any more."""
        self._sender.paused = False
        self._pump()

    def detach(self, error: Exception | None) -> None:
        """The stream has ended."""
        self._sent_bytes = self.sent_bytes
        lost = self.protocol.receive_eof()
        if isinstance(error, OSError):
            lost = ConnectionLost(f"{explain_loss(error)}: {lost.reason}")
        self.end(lost)
        self._sender.drop(self.failure)
        if self._timer is not None:
            self._timer.cancel()
        self._lost.set_result(None)

    def end(self, failure: WireError) -> None:
        """Say why nothing more is sent or received; the first reason counts."""
        if self.failure is None:
            self.failure = failure
            wake(self._opened)
            self._inbox.close()
            self._wake_senders()

    # Sending.

    def _send_replies(self) -> None:
        for reply in self.protocol.take_replies() if self.failure is None else ():
            self.queue(reply)
        if self._sender.urgent > _MAX_URGENT:
            self.abort(ConnectionLost("the peer floods this end with pings and does not read the answers"))

    def _pump(self) -> None:
        self._sender.pump()
        self._pumped()

    def _pumped(self) -> None:
        if self._senders and not self.full:
            self._wake_senders()
        if self._finishing and self._sender.idle and not self._stream.is_closing():
            self._stream.write_eof()

    def _wake_senders(self) -> None:
        while self._senders:
            wake(self._senders.popleft())

    # Ending.

    def _break(self, error: WireError) -> None:
        """End because of what the peer sent, and tell it."""
        self.end(error)
        frame = self.protocol.fail(error)
        if frame:
            self._sender.write_last(frame)
        self.broken(error)

    def _finish(self) -> None:
        """Close once everything queued is sent and the peer has closed as well."""
        if not self._finishing:
            self._finishing = True
            self._await_close()
            self._pump()

    def _await_close(self, sent_before: float = float("-inf")) -> None:
        sent, least = self.sent_bytes, self._config.least_bytes_per_s * self._config.close_s
        if sent - sent_before >= least:  # the peer may be slow, but it reads
            self._after(self._config.close_s, lambda: self._await_close(sent))
        elif self._stream.get_write_buffer_size():
            self._stream.abort()
        else:
            self._stream.close()

    # Time.

    def _after(self, delay_s: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._call_later(delay_s, callback)

    def _beat(self) -> None:
        """Ping, and see whether the peer is alive."""
        protocol = self.protocol
        self._beating = True
        listening = not self._inbox.full
        try:
            protocol.heartbeat(listening=listening)
            self._watch.check(
                arriving=protocol.arriving and listening,
                received_bytes=protocol.received_bytes - protocol.heartbeat_bytes,
                waiting=not self._sender.idle,
                sent_bytes=self.sent_bytes,
                unopened=protocol.role is Role.SERVER and protocol.phase is Phase.WELCOMED,
            )
        except ConnectionLost as lost:
            self.abort(lost)
            return
        self._after(min(protocol.heartbeat_s, protocol.timeout_s / 2, self._watch.period_s), self._beat)
        self._send_replies()

    def _handshake_expired(self) -> None:
        self.abort(ConnectionLost(f"the peer did not greet within {self._config.handshake_s:g} s"))
