"""The HTTP port: what it answers, and that nobody can make it stop answering others."""

import asyncio
import json
import urllib.request
from contextlib import asynccontextmanager, suppress

import pytest

from cloud.endpoint import LARGEST_REQUEST, MOST_CONNECTIONS, monitoring_endpoint
from cloud.monitoring import Monitor
from common.errors import UserError


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 60), debug=True)


async def ask(where, request):
    """Send bytes; return the status, the headers and the body."""
    reader, writer = await asyncio.open_connection(*where)
    try:
        writer.write(request)
        answer = await reader.read()
    finally:
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body


async def get(where, path, method="GET"):
    return await ask(where, f"{method} {path} HTTP/1.1\r\nHost: any\r\n\r\n".encode())


@asynccontextmanager
async def idle_client(where):
    reader, writer = await asyncio.open_connection(*where)
    try:
        yield reader, writer
    finally:
        writer.close()


def test_it_answers_a_plain_client_with_metrics():
    async def scenario():
        monitor = Monitor()
        monitor.connected()
        async with monitoring_endpoint(monitor, 0) as (host, port):

            def scrape():
                with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=30) as answer:
                    return answer.headers["Content-Type"], answer.read()

            kind, text = await asyncio.to_thread(scrape)
        assert kind.startswith("text/plain; version=0.0.4")
        assert b"\nisthmus_connections_total 1.0\n" in text

    run(scenario())


def test_health_is_200_and_503_while_draining():
    async def scenario():
        monitor = Monitor()
        async with monitoring_endpoint(monitor, 0) as where:
            status, headers, body = await get(where, "/health")
            assert (status, json.loads(body)["status"]) == (200, "ok")
            assert headers["Content-Type"] == "application/json"
            assert int(headers["Content-Length"]) == len(body)
            monitor.drain()
            status, _, body = await get(where, "/health?verbose=1")
            assert (status, json.loads(body)["status"]) == (503, "draining")

    run(scenario())


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics SPDY/3\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\xff\xfe\x00 \x80 HTTP/1.1\r\n\r\n", 405),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_it_answers_nothing_else(request_, expected):
    async def scenario():
        async with monitoring_endpoint(Monitor(), 0) as where:
            assert (await ask(where, request_))[0] == expected

    run(scenario())


def test_a_head_has_no_body():
    async def scenario():
        async with monitoring_endpoint(Monitor(), 0) as where:
            status, headers, body = await get(where, "/health", "HEAD")
            assert (status, body) == (200, b"")
            assert int(headers["Content-Length"]) > 0

    run(scenario())


def test_a_request_without_an_end_is_cut_off():
    async def scenario():
        async with monitoring_endpoint(Monitor(), 0) as where, idle_client(where) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\n" + b"X" * 4 * LARGEST_REQUEST)
            try:
                answer = await reader.read()
            except ConnectionError:  # it did not read what was left
                answer = b""
            assert answer.startswith(b"HTTP/1.1 400") or not answer
            assert (await get(where, "/health"))[0] == 200

    run(scenario())


def test_a_client_that_says_nothing_is_dropped():
    async def scenario():
        async with (
            monitoring_endpoint(Monitor(), 0, time_limit_s=0.05) as where,
            idle_client(where) as (reader, _),
        ):
            with suppress(ConnectionError):
                assert await reader.read() == b""

    run(scenario())


def test_any_number_of_slow_clients_keep_nobody_waiting():
    async def scenario():
        async with monitoring_endpoint(Monitor(), 0, time_limit_s=1000) as where:
            slow = [await asyncio.open_connection(*where) for _ in range(3 * MOST_CONNECTIONS)]
            for _, writer in slow:
                writer.write(b"GET /he")
            assert (await get(where, "/health"))[0] == 200
            for reader, _ in slow[:MOST_CONNECTIONS]:  # the oldest went
                with suppress(ConnectionError):
                    assert await reader.read() == b""
            for _, writer in slow:
                writer.close()

    run(scenario())


def test_closing_does_not_wait_for_a_slow_client():
    async def scenario():
        async with monitoring_endpoint(Monitor(), 0, time_limit_s=1000) as where:
            _, writer = await asyncio.open_connection(*where)
            assert (await get(where, "/health"))[0] == 200
        writer.close()
        with pytest.raises(ConnectionError):
            await asyncio.open_connection(*where)

    run(scenario())


def test_a_taken_port_is_said_in_a_line():
    async def scenario():
        async with monitoring_endpoint(Monitor(), 0) as (host, port):
            with pytest.raises(UserError, match=f"127.0.0.1:{port}: Address already in use") as caught:
                async with monitoring_endpoint(Monitor(), port, host=host):
                    pass
            assert "--metrics-port" in str(caught.value)

    run(scenario())


def test_two_servers_of_one_process_answer_each_for_itself():
    async def scenario():
        one, other = Monitor(), Monitor()
        one.set_sessions(active=5, parked=0)
        async with monitoring_endpoint(one, 0) as here, monitoring_endpoint(other, 0) as there:
            found = [json.loads((await get(where, "/health"))[2])["sessions"] for where in (here, there)]
        assert found == [5, 0]

    run(scenario())
