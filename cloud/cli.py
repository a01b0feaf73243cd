"""The command ``cloud-server``."""

import logging
import sys
from pathlib import Path

import click

from common.command import run_cli, run_command
from wire.codecs.options import parse_size


def _size(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    size = parse_size(text)
    if size is None:
        raise click.BadParameter(f"{text!r} is no size; give a number of bytes, such as 500M or 16G")
    return size


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("cloud-server", context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option(
    "--port", default=7433, type=click.IntRange(0, 65535), help="Port to listen on; 0 takes a free one."
)
@click.option("--gpu", type=click.IntRange(0), help="Compute on this GPU.  [default: 0 if there is one]")
@click.option("--cpu", is_flag=True, help="Compute on the CPU.")
@click.option("--threads", type=click.IntRange(1), help="Threads for computing.  [default: one a core]")
@click.option("--max-sessions", default=8, type=click.IntRange(1), help="Clients served at once.")
@click.option(
    "--memory-limit",
    callback=_size,
    metavar="SIZE",
    help="Memory for all clients' sessions, such as 12G.  [default: most of what there is]",
)
@click.option(
    "--disk-limit",
    default="16G",
    callback=_size,
    metavar="SIZE",
    help="Disk that one client's delta may take, such as 500M.",
)
@click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep sessions here, so that clients can go on after this server was started again.",
)
@click.option(
    "--state-limit",
    callback=_size,
    metavar="SIZE",
    help="Disk for all that is kept there, such as 100G.  [default: half of what is free at the start]",
)
@click.option(
    "--park-after",
    default=600.0,
    type=click.FloatRange(1.0),
    metavar="SECONDS",
    help="A session leaves memory after so long without its client.",
)
@click.option(
    "--forget-after",
    default=7 * 24 * 3600.0,
    type=click.FloatRange(1.0),
    metavar="SECONDS",
    help="Nothing is left of it after so long.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Serve Prometheus metrics and a health check here over HTTP; 0 takes a free port.  [default: not]",
)
@click.option("--metrics-host", default="127.0.0.1", help="Address for that.")
@click.option(
    "--heartbeat",
    default=5.0,
    type=click.FloatRange(0.1, 3600),
    metavar="SECONDS",
    help="Between heartbeats; three without an answer, and a client counts as lost.",
)
@click.option("--token-file", type=_FILE, help="Serve only clients that know the token in this file.")
@click.option("--tls-cert", type=_FILE, help="Encrypt, with the certificate in this file (PEM).")
@click.option("--tls-key", type=_FILE, help="Its private key (PEM).")
@click.option(
    "--tls-client-ca", type=_FILE, help="Serve only clients with a certificate that these authorities signed."
)
@click.option(
    "--make-cert",
    is_flag=True,
    help="Write a certificate and its key to --tls-cert and --tls-key (cert.pem and key.pem), say how clients pin it,"
    " and end.",
)
@click.option(
    "--insecure", is_flag=True, help="Listen where others can reach the server, even without TLS and token."
)
@click.option(
    "--import", "modules", multiple=True, metavar="MODULE", help="Import a module that registers models."
)
@click.option("--quiet", is_flag=True, help="Log warnings only.")
@click.option("--owned", is_flag=True, hidden=True, help="End when standard input ends.")
@click.option("--debug", is_flag=True, help="Say more, and show tracebacks.")
def cli(
    host: str,
    port: int,
    gpu: int | None,
    cpu: bool,
    threads: int | None,
    max_sessions: int,
    memory_limit: int | None,
    disk_limit: int,
    state_dir: Path | None,
    state_limit: int | None,
    park_after: float,
    forget_after: float,
    metrics_port: int | None,
    metrics_host: str,
    heartbeat: float,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    make_cert: bool,
    insecure: bool,
    modules: tuple[str, ...],
    quiet: bool,
    owned: bool,
    debug: bool,
) -> None:
    """Compute the middle of models for edge clients, on a GPU or the CPU.

    The first line on standard output says where the server listens; its log goes to standard error.
    """
    if cpu and gpu is not None:
        raise click.UsageError("--gpu and --cpu exclude each other; give one of them.")
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(message)s",
    )
    if not debug:
        logging.getLogger("torch").setLevel(logging.WARNING)  # it reports on its caches at exit

    def write_certificate() -> None:
        from cloud.certificate import make_certificate

        cert, key = tls_cert or Path("cert.pem"), tls_key or Path("key.pem")
        fingerprint = make_certificate(cert, key, host)
        sys.stdout.write(
            f"wrote {cert} and {key}; start the server with --tls-cert {cert} --tls-key {key}, and clients with:\n"
            f"--tls-fingerprint {fingerprint}\n"
        )

    def serve() -> None:
        # torch is slow to import: a wrong command line is answered without it.
        from cloud.security import Security

        security = Security(
            token_file=token_file,
            tls_cert=tls_cert,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            insecure=insecure,
        )
        from cloud.device import first_gpu
        from cloud.server import ServerConfig, serve_until_signal
        from common.imports import import_modules
        from wire.transport import run

        import_modules(modules)
        config = ServerConfig(
            host=host,
            port=port,
            gpu=None if cpu else first_gpu() if gpu is None else gpu,
            threads=threads,
            max_sessions=max_sessions,
            memory_limit=memory_limit,
            disk_limit=disk_limit,
            state_dir=state_dir,
            state_limit=state_limit,
            park_after=park_after,
            forget_after=forget_after,
            metrics_port=metrics_port,
            metrics_host=metrics_host,
            heartbeat_s=heartbeat,
            security=security,
        )
        run(serve_until_signal(config, owned=owned))

    run_command(write_certificate if make_cert else serve, debug=debug)


def main() -> None:
    """Run the console script."""
    run_cli(cli)
