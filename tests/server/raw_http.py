"""Requests byte for byte, as no client library would send them."""

from __future__ import annotations

import socket
from collections.abc import Iterable


def send(url: str, *parts: bytes | str, timeout: float = 10.0) -> bytes:
    """Send the parts and read until the server closes (or the parts ended and it stays silent)."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        try:
            for part in parts:
                connection.sendall(part.encode() if isinstance(part, str) else part)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has seen enough
        return read(connection)


def read(connection: socket.socket) -> bytes:
    answer = b""
    try:
        while piece := connection.recv(65536):
            answer += piece
    except ConnectionResetError:
        pass
    return answer


def head(method: str, target: str, headers: Iterable[str] = (), *, close: bool = True) -> str:
    lines = [f"{method} {target} HTTP/1.1", "Host: x", *headers, *(["Connection: close"] if close else [])]
    return "\r\n".join([*lines, "", ""])


def status(answer: bytes) -> int:
    """0: closed without a word."""
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0
