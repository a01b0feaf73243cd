"""How a client proves that it may use a server, and knows that it is the right one."""

from common.errors import UserError
from edge.config import TrainConfig
from wire.config import WireConfig
from wire.tls import client_context, parse_fingerprint
from wire.token_file import read_token


def wire_config(config: TrainConfig) -> WireConfig:
    """Return a connection's settings.

    Raises:
        UserError: options that do not go together, or a file that cannot be used.
    """
    over_tls = config.tls or config.tls_fingerprint is not None or config.tls_ca is not None
    if (config.tls_cert is None) != (config.tls_key is None):
        raise UserError(
            "--tls-cert and --tls-key go together: the certificate to show to the server, and its key"
        )
    if config.tls_cert is not None and not over_tls:
        raise UserError(
            "--tls-cert is shown over TLS: say how to know the server, with --tls-fingerprint, --tls or --tls-ca"
        )
    try:
        pin = None if config.tls_fingerprint is None else parse_fingerprint(config.tls_fingerprint)
    except ValueError as error:
        raise UserError(f"--tls-fingerprint {error}") from None
    try:
        token = None if config.token_file is None else read_token(config.token_file)
        # Asked for as well, the system's authorities have to vouch for a pinned certificate, too.
        pinned = pin is not None and not config.tls
        ca, cert, key = config.tls_ca, config.tls_cert, config.tls_key
        tls = client_context(pinned=pinned, ca=ca, cert=cert, key=key) if over_tls else None
    except ValueError as error:
        raise UserError(str(error)) from None
    return WireConfig(token=token, tls=tls, tls_fingerprint=pin)
