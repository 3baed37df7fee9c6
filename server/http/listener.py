"""The sockets that a server listens on."""

import errno
import socket

from server.settings import SettingError


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets on every address of `host`, before anything is loaded. Raises `SettingError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise SettingError(f"--host: {host}: {error.strerror}") from None
    except UnicodeError:
        raise SettingError(f"--host: {host!r} is no host's name") from None
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in found[:1] if port == 0 else found:  # a free port is one address's
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind(address)
        except OSError as error:
            for bound in (*sockets, listener):
                bound.close()
            if error.errno == errno.EADDRINUSE:
                raise SettingError(f"--port: {port} on {host} is in use by another program") from None
            raise SettingError(f"--host: cannot listen on {host} port {port}: {error.strerror}") from None
        sockets.append(listener)
    return sockets
