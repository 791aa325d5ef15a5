"""What was made cheap because it happens for every token says the same as what it stands in for."""

from __future__ import annotations

import h11
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from martlet.server.protocol import Connection
from martlet.server.token_latency import TokenLatency

HEADERS = {
    "chunks": [("content-type", "text/event-stream")],
    "length": [("content-length", "9")],
    "close": [("connection", "close")],
}


def written(kind: type[h11.Connection], head: bytes, headers: list[tuple[str, str]]) -> bytes:
    """Two answers on one connection, if it stays open."""
    connection, out = kind(h11.SERVER), b""
    for _ in range(2):
        connection.receive_data(head)
        while connection.next_event() is not h11.NEED_DATA and connection.their_state is not h11.DONE:
            pass
        out += connection.send(h11.Response(status_code=200, headers=headers))
        for data in (b"data", b"", b": end"):
            out += connection.send(h11.Data(data=data))
        out += connection.send(h11.EndOfMessage())
        if connection.our_state is h11.MUST_CLOSE:
            break
        connection.start_next_cycle()
    return out


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_connection_writes_what_h11_writes(headers, version):
    head = b"GET / HTTP/" + version + b"\r\nhost: here\r\n\r\n"
    found = written(Connection, head, headers)
    assert found == written(h11.Connection, head, headers)
    assert found.count(b"data") == (2 if version == b"1.1" and headers is not HEADERS["close"] else 1)


def test_no_data_before_an_answer_or_after_its_end():
    connection = Connection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
    connection.next_event()
    with pytest.raises(h11.LocalProtocolError):
        connection.send(h11.Data(data=b"early"))
    connection = Connection(h11.SERVER)
    connection.receive_data(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
    connection.next_event(), connection.next_event()
    connection.send(h11.Response(status_code=200, headers=[]))
    connection.send(h11.EndOfMessage())
    with pytest.raises(h11.LocalProtocolError):
        connection.send(h11.Data(data=b"late"))


def test_latencies_are_told_as_prometheus_would():
    bounds, labels = (0.001, 0.01, 0.5), {"model_name": "m", "engine": "0"}
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("a:b_seconds", "about", list(labels), buckets=bounds, registry=theirs)
    latency = TokenLatency("a:b_seconds", "about", bounds, labels)

    class Collector:
        def collect(self):
            return [latency.family()]

    ours.register(Collector())
    for seconds in (0.0, 0.001, 0.0011, 0.3, 0.5, 7.0):
        histogram.labels(*labels.values()).observe(seconds)
        latency.observe(seconds)
    want = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert sorted(generate_latest(ours).decode().splitlines()) == sorted(want)
