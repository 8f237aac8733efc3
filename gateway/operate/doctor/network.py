"""Checks of the network: the gateway's own ports, and names."""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import httpx
import msgspec

from gateway.ingress.subscription import address_of
from gateway.operate.doctor.finding import Finding, fault, ok
from gateway.operate.own_endpoint import own_client, own_url
from gateway.settings import HttpDestination

if TYPE_CHECKING:
    from gateway.settings import GatewaySettings

_ANSWER_S: Final = 3.0
_RESOLVE_S: Final = 5.0
_PRIVILEGED: Final = 1024


class _Who(msgspec.Struct):
    gateway_id: str = ""


def running_gateway(settings: GatewaySettings) -> str | None:
    """The name of the gateway that answers at the status endpoint; None when none does."""
    if not settings.status.enabled:
        return None
    try:
        with own_client(_ANSWER_S) as client:
            answer = client.get(f"{own_url(settings.status)}/status")
        return msgspec.json.decode(answer.content, type=_Who).gateway_id or None
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError, OSError):
        return None


def check_ports(settings: GatewaySettings, running: str | None) -> list[Finding]:
    """Whether the ports are the gateway's, or free for it. `running` is the gateway that answers now."""
    wanted = [("ingress.listen", settings.ingress.listen.host, settings.ingress.listen.port)]
    if settings.ingress.http.enabled:
        wanted.append(("ingress.http", settings.ingress.http.host, settings.ingress.http.port))
    if settings.status.enabled:
        wanted.append(("status", settings.status.host, settings.status.port))
    return [check_port(key, host, port, running, settings.gateway_id) for key, host, port in wanted]


def check_port(key: str, host: str, port: int, running: str | None, gateway_id: str) -> Finding:
    """Whether one port can be bound, or is bound by the gateway itself."""
    subject = f"{host or '*'}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as reason:
        return _port_fault(key, subject, reason, running, gateway_id)
    if running == gateway_id:
        advice = "look into its log: the port may have been changed since it started"
        return fault("port", subject, f"{key}: the gateway runs, but nothing listens here", advice)
    return ok("port", subject, f"{key}: free")


def _port_fault(key: str, subject: str, reason: OSError, running: str | None, gateway_id: str) -> Finding:
    words = f"{key}: {reason.strerror or reason}"
    if reason.errno == errno.EADDRINUSE and running is not None:
        if running == gateway_id:
            return ok("port", subject, f"{key}: the running gateway's")
        return fault(
            "port", subject, f"{key}: the gateway {running} has it", "give each gateway ports of its own"
        )
    advice = {
        errno.EADDRINUSE: "another program has it: find it with ss -ltnp, or take another port",
        errno.EACCES: f"ports below {_PRIVILEGED} need AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit",
        errno.EADDRNOTAVAIL: "this machine has no such address: see ip addr, or take 0.0.0.0",
    }
    return fault("port", subject, words, advice.get(reason.errno or 0, f"correct {key}.host"))


async def check_names(settings: GatewaySettings) -> list[Finding]:
    """Whether the names of destinations, proxies and brokers lead to addresses."""
    hosts: dict[str, str] = {}
    for subscribe in settings.ingress.subscribe:
        hosts.setdefault(address_of(subscribe.url).host, f"broker {subscribe.name or subscribe.url}")
    for destination in settings.destinations:
        if isinstance(destination, HttpDestination):
            for url in filter(None, (destination.proxy or destination.url,)):
                hosts.setdefault(urlsplit(url).hostname or "", f"destination {destination.name}")
    return list(await asyncio.gather(*(check_name(host, whose) for host, whose in hosts.items())))


async def check_name(host: str, whose: str) -> Finding:
    """Whether one name leads to an address."""
    advice = "check the name, and the name servers (resolvectl status); readings wait until it is known"
    try:
        async with asyncio.timeout(_RESOLVE_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except TimeoutError:
        return fault("name", host, f"{whose}: no name server answers within {_RESOLVE_S:g} s", advice)
    except (OSError, UnicodeError) as reason:
        return fault("name", host, f"{whose}: {getattr(reason, 'strerror', None) or reason}", advice)
    return ok("name", host, f"{whose}: {found[0][4][0]}")
