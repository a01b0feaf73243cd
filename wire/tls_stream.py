"""A byte stream inside another one: TLS over whatever carries bytes. Sans-I/O, as the channel above it is.

It stands between a transport and a `wire.channel.Channel`: to the channel it is the stream; from the transport it
takes what comes. Because the TLS is done here and not by the event loop, all that the plain connection does holds
under it, too: the same writing on both loops, counts of the bytes that the socket carried, a closed direction
that still delivers its last bytes, and a failed handshake that is told in words.
"""

from __future__ import annotations

import contextlib
import hmac
import ssl
from collections.abc import Callable
from typing import Any

from wire.channel import Channel
from wire.config import WireConfig
from wire.errors import TlsFailed
from wire.frames import HANDSHAKE_LIMITS
from wire.loop import Stream
from wire.messages import Error
from wire.prelude import MAGIC
from wire.protocol import Role
from wire.serialize import encode
from wire.tls import explain_tls, fingerprint, spell_fingerprint

__all__ = ["TlsStream"]

_FIRST_BUFFER, _BUFFER = 16 * 1024, 256 * 1024  # strangers get the smaller one
_TLS_WANTED = Error(
    "tls_wanted",
    "the server wants TLS; give --tls-fingerprint with its certificate's fingerprint, or --tls or --tls-ca to have"
    " it verified",
)


class TlsStream:
    """One end's TLS.

    Args:
        stream: the transport.
        channel: what is above; its stream is this.
        role: which end this is.
        config: with `tls` set.
        host: the server's name, for the client to verify; None at the server.
        call_soon: calls a function when the event loop is next free.

    Attributes:
        secured: the handshake is over, and the peer's certificate the right one.
        received_bytes: that came on the transport.
        added_bytes: given to the transport beyond what the channel gave.
    """

    def __init__(
        self,
        stream: Stream,
        channel: Channel,
        role: Role,
        config: WireConfig,
        host: str | None,
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        assert config.tls is not None
        self.secured = False
        self.received_bytes = self.added_bytes = 0
        self._stream, self._channel = stream, channel
        self._is_client = role is Role.CLIENT
        self._fingerprint = config.tls_fingerprint
        self._call_soon = call_soon
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = config.tls.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=not self._is_client,
            server_hostname=host
            and host.partition("%")[0],  # a link-local address's interface is no part of it
        )
        self._buffer = memoryview(bytearray(_FIRST_BUFFER))
        self._paused = self._closing = self._eof = False
        self._useless = False  # TLS has failed: what is given to it goes nowhere

    # What happens to the transport.

    def begin(self) -> None:
        """It is connected."""
        self._shake_hands()

    def next_buffer(self) -> memoryview:
        """Return the memory that the next bytes belong into."""
        return self._buffer

    def received(self, nbytes: int) -> None:
        """Bytes came into `next_buffer`."""
        first = self.received_bytes == 0
        self.received_bytes += nbytes
        if self._closing:
            return  # nobody waits for them any more; they are read so that the peer's end closes cleanly
        if first and not self._is_client and bytes(self._buffer[: len(MAGIC)]) == MAGIC:
            self._write_plain(_TLS_WANTED)
            self._channel.broken(TlsFailed("the client speaks no TLS"))
            return
        self._incoming.write(self._buffer[:nbytes])
        if not self.secured:
            self._shake_hands()
        if self.secured:
            self._decrypt()

    def received_eof(self) -> bool:
        """Nothing more comes; say whether the transport is to stay open, for what is not decrypted yet."""
        self._eof = True
        if not self.secured and not self._closing:
            self._channel.broken(
                TlsFailed(_HUNG_UP if self._is_client else "the client hung up", final=False)
            )
        self._decrypt()
        return self._paused

    # What the channel wants.

    def write(self, data: memoryview, /) -> None:
        """Encrypt and send."""
        self.writelines([data])

    def writelines(self, buffers: list[Any], /) -> None:
        """Encrypt and send."""
        self.added_bytes -= sum(map(len, buffers))
        if self._useless:
            return
        try:
            for buffer in buffers:
                unsent = memoryview(buffer)
                while unsent:
                    unsent = unsent[self._tls.write(unsent) :]
        except ssl.SSLError as error:
            self._useless = True
            failure = explain_tls(error, client=self._is_client)
            self._call_soon(lambda: self._channel.broken(failure))  # not at once: the channel is busy
        self._flush()

    def write_eof(self) -> None:
        """Say that nothing more is sent, in TLS and then in TCP."""
        if self._closing:
            return
        self._closing = True
        with contextlib.suppress(ssl.SSLError, ValueError):
            self._tls.unwrap()  # it wants to read the peer's farewell, too, and says so
        self._flush()
        self._stream.write_eof()

    def get_write_buffer_size(self) -> int:
        """Return how many bytes the kernel has not taken yet, encrypted."""
        return self._stream.get_write_buffer_size()

    def pause_reading(self) -> None:
        """Give the channel nothing more."""
        self._paused = True
        self._stream.pause_reading()

    def resume_reading(self) -> None:
        """Go on."""
        self._paused = False
        self._stream.resume_reading()
        self._call_soon(self._decrypt)  # not at once: the channel is busy

    def is_closing(self) -> bool:
        """Whether the transport is."""
        return self._stream.is_closing()

    def close(self) -> None:
        """Close the transport once it has sent what it has."""
        self._stream.close()

    def abort(self) -> None:
        """Close the transport at once."""
        self._stream.abort()

    # TLS.

    def _shake_hands(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLError as error:
            self._flush()  # an alert tells the peer
            self._channel.broken(explain_tls(error, client=self._is_client))
        else:
            self._flush()
            self._check_fingerprint()

    def _check_fingerprint(self) -> None:
        if self._fingerprint is not None:
            shown = fingerprint(self._tls.getpeercert(binary_form=True) or b"")
            if not hmac.compare_digest(shown, self._fingerprint):
                self._channel.broken(
                    TlsFailed(
                        f"the server shows another certificate, of fingerprint {spell_fingerprint(shown)}; if it has"
                        " been given a new one, give --tls-fingerprint that, else somebody is in between"
                    )
                )
                return
        self._buffer = memoryview(bytearray(_BUFFER))
        self.secured = True
        self._channel.greet()

    def _decrypt(self) -> None:
        """Give the channel all that can be decrypted, as long as it wants to read."""
        while self.secured and not (self._paused or self._closing or self._stream.is_closing()):
            buffer = self._channel.protocol.next_buffer()
            count, ended, failure = self._read_into(buffer)
            if count:
                self._channel.received(count)
            if failure is not None:
                self._channel.broken(failure)
            elif ended:
                self._channel.received_eof()
                if self._eof:
                    self._stream.close()
            if count < len(buffer):
                break
        self._flush()  # TLS may have had something to say for itself

    def _read_into(self, buffer: memoryview) -> tuple[int, bool, TlsFailed | None]:
        """Decrypt into a buffer; return how many bytes, whether they are the last, and what failed after them."""
        count = 0
        try:
            while count < len(buffer):
                read: Any = self._tls.read(len(buffer) - count, buffer[count:])  # a number, says the manual
                if not read:
                    return count, True, None
                count += read
        except ssl.SSLWantReadError:
            return count, self._eof, None
        except ssl.SSLError as error:
            self._useless = True
            return count, True, explain_tls(error, client=self._is_client)
        return count, False, None

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data:
            self.added_bytes += len(data)
            if not self._stream.is_closing():
                self._stream.write(memoryview(data))

    def _write_plain(self, message: Error) -> None:
        frame = b"".join(map(bytes, encode(message, HANDSHAKE_LIMITS)[0]))
        self.added_bytes += len(frame)
        self._stream.write(memoryview(frame))


_HUNG_UP = (
    "the server hung up on TLS; if it was started without --tls-cert, leave out the --tls options, else its log"
    " says why"
)
