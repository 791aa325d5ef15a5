"""Where the server listens: a TCP address or a Unix socket, and what TLS needs, checked before a model loads."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat

from martlet.errors import MartletError


def bind(host: str, port: int) -> socket.socket:
    """A socket that owns the address but does not listen yet, so that clients are refused until the model is there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise MartletError(f"cannot use host {host!r}: {error.strerror or error}", param="host") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise MartletError(
                f"port {port} of {host} is in use; stop the other server or choose another with --port", param="port"
            ) from None
        raise MartletError(f"cannot bind to {host} port {port}: {error.strerror}", param="port") from None
    return listener


def bind_unix(path: str) -> socket.socket:
    """The same on a Unix socket. Who may connect follows from the umask and the folder; a socket that a killed server
    left behind is replaced."""
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise MartletError(f"cannot use socket {path}: {error.strerror or error}", param="uds") from None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        said = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise MartletError(f"cannot bind to socket {path}: {said}", param="uds") from None
    return listener


def address(listener: socket.socket, *, tls: bool) -> str:
    """What to tell people: a URL, or the path of a Unix socket."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def check_tls(certfile: str | None, keyfile: str | None) -> None:
    """Raise MartletError unless the two files are a certificate chain and its key, or none is given."""
    if certfile is None and keyfile is None:
        return
    if certfile is None:
        raise MartletError(
            "--ssl_keyfile needs --ssl_certfile, the certificate that the key is for", param="ssl_certfile"
        )
    for name, path in (("ssl_certfile", certfile), ("ssl_keyfile", keyfile)):
        if path is not None and not os.path.isfile(path):
            raise MartletError(f"--{name}: there is no file {path}", param=name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
    except (ssl.SSLError, OSError) as error:
        raise MartletError(
            f"{certfile} and {keyfile or 'the key in it'} make no TLS certificate: {error}", param="ssl_certfile"
        ) from None
