"""A guard over the process's sockets: what is not this machine is refused, and remembered."""

import ipaddress
import socket

LOCAL = ("localhost", "", None)


class Asked(list):
    """Addresses that something wanted to reach."""


def is_local(address):
    host = address[0] if isinstance(address, tuple) else None  # a path is a socket of this machine
    try:
        return host in LOCAL or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guard(monkeypatch):
    """Patch the socket module until the monkeypatch ends. Returns the list of addresses asked for."""
    asked, connect, lookup = Asked(), socket.socket.connect, socket.getaddrinfo

    def refuse(address):
        asked.append(address)
        raise OSError(101, f"Network is unreachable: {address!r}")

    monkeypatch.setattr(socket.socket, "connect", lambda self, to: connect(self, to) if is_local(to) else refuse(to))
    monkeypatch.setattr(socket.socket, "connect_ex", lambda self, to: refuse(to) if not is_local(to) else 111)
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **more: lookup(host, *rest, **more) if is_local((host,)) else refuse(host),
    )
    return asked
