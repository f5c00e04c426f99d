"""Sockets that a service listens on."""

from __future__ import annotations

import ipaddress
import os
import socket

from remora.errors import ConfigError

TOKEN_VARIABLE = "REMORA_TOKEN"
"""The environment variable with the token that clients must send."""


def bind(host: str, port: int, *, has_token: bool, advice: str) -> socket.socket:
    """Return a socket that is bound to an address.

    Args:
        host: A name or an address.
        port: A port; 0 takes a free one.
        has_token: Whether clients must send a token, without which others may not reach it.
        advice: What to do if it cannot be bound.

    Raises:
        ConfigError: If the port is in use or cannot be bound, or the address needs a token and
            there is none.
    """
    where = f"{host}, port {port}"
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, number, _, address = addresses[0]
        if not has_token and not ipaddress.ip_address(address[0]).is_loopback:
            raise ConfigError(
                f"{host} can be reached from other machines and there is no token; set "
                f"{TOKEN_VARIABLE} or give --token-file"
            )
        bound = socket.socket(family, kind, number)
        try:
            if os.name != "nt":  # there it would let two processes have one port
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {where} ({reason}); {advice}") from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the address that a socket is bound to, as a URL without a path."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
