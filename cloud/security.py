"""How a server knows its clients and hides what crosses, and whether that does for where it listens."""

import ipaddress
import logging
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from wire.config import WireConfig
from wire.tls import server_context
from wire.token_file import read_token

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Security:
    """Settings; each is an option of ``cloud-server`` of the same name.

    Attributes:
        token_file: holds the token that clients have to know; None to ask for none.
        tls_cert: PEM file of the server's certificate; None for no TLS.
        tls_key: PEM file of its private key.
        tls_client_ca: PEM file of the authorities that sign clients' certificates; None to ask for none.
        insecure: listen on any address, even where others can read along or use the server.
    """

    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without the files.

        Raises:
            UserError: options that do not go together.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UserError(
                "--tls-cert and --tls-key go together; cloud-server --make-cert writes both files"
            )
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise UserError(
                "--tls-client-ca asks for certificates over TLS: give --tls-cert and --tls-key, too"
            )

    def check_host(self, host: str) -> None:
        """See whether a server may listen on an address; a warning is logged where only `insecure` allows it.

        Raises:
            UserError: it may not; the message says what to do.
        """
        if is_loopback(host):
            return
        hidden = self.tls_cert is not None
        known = self.token_file is not None or self.tls_client_ca is not None
        if hidden and known:
            return
        if not self.insecure:
            raise UserError(
                f"other machines can reach --host {host}, so it takes"
                f"{'' if hidden else ' TLS (--tls-cert and --tls-key; cloud-server --make-cert writes them)'}"
                f"{'' if hidden or known else ' and'}{'' if known else ' a token (--token-file)'}; or give --insecure"
                " where everybody on the network may use this server and read what crosses"
            )
        logger.warning(
            "anyone who can reach %s can %s: %s",
            host,
            "read along" if known else "use this server",
            " and ".join(
                [
                    *([] if known else ["nothing asks who they are"]),
                    *([] if hidden else ["nothing is encrypted"]),
                ]
            ),
        )

    def apply(self, wire: WireConfig) -> WireConfig:
        """Return a connection's settings with these in them.

        Raises:
            UserError: a file that cannot be used.
        """
        try:
            token = None if self.token_file is None else read_token(self.token_file)
            tls = (
                None
                if self.tls_cert is None or self.tls_key is None
                else server_context(self.tls_cert, self.tls_key, self.tls_client_ca)
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        return replace(wire, token=token, tls=tls)


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
