"""Checks of the network: the gateway's own ports, name resolution, destinations and brokers, without
writing anything.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
import time
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib.metadata import version
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from cloud_sync.destinations.http_client import build_http_client
from cloud_sync.runtime.secret_files import read_secret, redact_text
from gateway.auth.tls import TlsFileError, build_client_context
from gateway.doctor import Finding, fault, ok, warning
from gateway.humanize import escape_text
from gateway.mqtt.broker_session import (
    BrokerError,
    BrokerLimits,
    SubscriberOptions,
    build_broker_error,
    build_connect,
    find_broker_concerns,
    parse_broker_url,
)
from gateway.mqtt.codec.packet_codec import encode_packet
from gateway.mqtt.codec.packets import (
    Connack,
    Disconnect,
    MqttProtocolError,
    Property,
    ReasonCode,
    TopicCache,
)
from gateway.mqtt.codec.parser import PacketParser
from gateway.settings.destinations import HttpDestination, InfluxDestination, IngestDestination
from gateway.settings.schema import is_loopback
from gateway.web.client import GatewayClientError, local_gateway_client

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.settings.destinations import AnyDestination
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.settings.sources import Subscribe

_STATUS_TIMEOUT_S: Final = 3.0
_RESOLVE_TIMEOUT_S: Final = 5.0


class _StatusIdentity(msgspec.Struct):
    gateway_id: str = ""


def find_running_gateway(settings: GatewaySettings) -> str | None:
    """The name of the gateway that answers at the status endpoint; None when none does."""
    client = local_gateway_client(settings.status, _STATUS_TIMEOUT_S)
    try:
        return None if client is None else client.get("/status", _StatusIdentity).gateway_id or None
    except GatewayClientError:
        return None


def check_ports(settings: GatewaySettings, running: str | None) -> list[Finding]:
    """Whether each port is free or already the gateway's own. `running` is the gateway that answers now."""
    ports = [("ingress.listen", settings.ingress.listen.host, settings.ingress.listen.port)]
    if settings.ingress.http.enabled:
        ports.append(("ingress.http", settings.ingress.http.host, settings.ingress.http.port))
    if settings.status.enabled:
        ports.append(("status", settings.status.host, settings.status.port))
    return [check_port(key, host, port, running, settings.gateway_id) for key, host, port in ports]


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
        return _explain_bind_error(key, subject, reason, running, gateway_id)
    if running == gateway_id:
        advice = "see its log: the port may have been changed since it started"
        return fault("port", subject, f"{key}: the gateway runs, but nothing listens here", advice)
    return ok("port", subject, f"{key}: free")


def _explain_bind_error(
    key: str, subject: str, error: OSError, running: str | None, gateway_id: str
) -> Finding:
    if error.errno == errno.EADDRINUSE and running == gateway_id:
        return ok("port", subject, f"{key}: in use by the running gateway")
    if error.errno == errno.EADDRINUSE and running is not None:
        what = f"{key}: in use by gateway {running}"
        return fault("port", subject, what, "give each gateway its own ports")
    advice = {
        errno.EADDRINUSE: "another program uses it: find it with ss -ltnp, or choose another port",
        errno.EACCES: "ports below 1024 need AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit",
        errno.EADDRNOTAVAIL: "this machine has no such address: see ip addr, or use 0.0.0.0",
    }.get(error.errno or 0, f"correct {key}.host")
    return fault("port", subject, f"{key}: {error.strerror or error}", advice)


async def check_names(settings: GatewaySettings) -> list[Finding]:
    """Whether the host names of destinations, proxies and brokers resolve."""
    hosts: dict[str, str] = {}
    for subscribe in settings.ingress.subscribe:
        hosts.setdefault(parse_broker_url(subscribe.url).host, f"broker {subscribe.name or subscribe.url}")
    for destination in settings.destinations:
        if isinstance(destination, HttpDestination):
            for url in filter(None, (destination.proxy or destination.url,)):
                hosts.setdefault(urlsplit(url).hostname or "", f"destination {destination.name}")
    return list(await asyncio.gather(*(check_name(host, whose) for host, whose in hosts.items())))


async def check_name(host: str, whose: str) -> Finding:
    """Whether one host name resolves."""
    advice = "check the name, and the name servers (resolvectl status); readings wait in the spool"
    try:
        async with asyncio.timeout(_RESOLVE_TIMEOUT_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except TimeoutError:
        return fault("name", host, f"{whose}: no name server answered in {_RESOLVE_TIMEOUT_S:g} s", advice)
    except (OSError, UnicodeError) as reason:
        return fault("name", host, f"{whose}: {getattr(reason, 'strerror', None) or reason}", advice)
    return ok("name", host, f"{whose}: {found[0][4][0]}")


UPSTREAM_TIMEOUT_S: Final = 10.0
_CLOCK_SKEW_MAX_S: Final = 30.0
_ANSWER_MAX_CHARS: Final = 200


async def check_upstreams(settings: GatewaySettings) -> list[Finding]:
    """Check every destination and every broker concurrently."""
    checks = [check_destination(d, settings.gateway_id) for d in settings.destinations]
    checks += [check_broker(table, settings.gateway_id) for table in settings.ingress.subscribe]
    return [finding for found in await asyncio.gather(*checks) for finding in found]


async def check_destination(
    destination: AnyDestination,
    gateway_id: str,
    *,
    clock_s: Callable[[], float] = time.time,
    within_s: float = UPSTREAM_TIMEOUT_S,
) -> list[Finding]:
    """Whether a destination can be reached and accepts this gateway, and its release."""
    if not isinstance(destination, HttpDestination):
        return []  # folders are checked by check_folders
    name = destination.name
    try:
        secret = "" if destination.secret_file is None else read_secret(destination.secret_file)
        options = destination.http_options()
    except (OSError, UnicodeDecodeError) as reason:
        return [fault("destination", name, str(reason), "correct that file; see the checks above")]
    found = []
    url = urlsplit(destination.url)
    secure = url.scheme == "https"
    if secret and not secure and not is_loopback(url.hostname or ""):
        what = "its token is sent unencrypted: url is http://"
        found.append(warning("destination", name, what, "enable TLS there, and use https://"))
    headers = {}
    if secret and not (isinstance(destination, InfluxDestination) and destination.token_file is None):
        scheme = "Bearer" if isinstance(destination, IngestDestination) else "Token"
        headers["Authorization"] = f"{scheme} {secret}"
    async with build_http_client(options, secure=secure, timeout=within_s, headers=headers) as http:
        try:
            if isinstance(destination, IngestDestination):
                answer, finding = await _probe_ingest(http, destination, gateway_id)
            else:
                assert isinstance(destination, InfluxDestination)
                answer, finding = await _probe_influx(http, destination, secret)
        except httpx.TimeoutException:
            what = f"no answer within {within_s:g} s"
            return [*found, fault("destination", name, what, _UNREACHABLE_ADVICE)]
        except (httpx.HTTPError, httpx.StreamError, ssl.SSLError) as error:
            what = redact_text(str(error)) or type(error).__name__
            advice = _TLS_ADVICE if "SSL" in what or "certificate" in what else _UNREACHABLE_ADVICE
            return [*found, fault("destination", name, what, advice)]
    return [*found, *_check_date(name, answer, clock_s()), finding]


_UNREACHABLE_ADVICE = "check address, routes and firewalls; readings wait in the spool"
_TLS_ADVICE = "check ca_file (who signed the server's certificate), the name in url, and the clock"
_UNAUTHORIZED_ADVICE = "create a new token at the region (tidegate ingest token add), write it to token_file"


async def _probe_ingest(
    http: httpx.AsyncClient, destination: IngestDestination, gateway_id: str
) -> tuple[httpx.Response, Finding]:
    name = destination.name
    answer = await http.get(f"{destination.url}/v1/gateways/{quote(gateway_id, safe='')}")
    if answer.status_code in (401, 403):
        return answer, _rejected(name, answer, _UNAUTHORIZED_ADVICE)
    try:
        document = msgspec.json.decode(answer.content, type=dict[str, object])
    except msgspec.DecodeError:
        document = {}
    if not answer.is_success or "epochs" not in document:
        return answer, _unexpected(name, answer, "a Tidegate ingest service")
    theirs, own = answer.headers.get("Tidegate-Version", ""), version("tidegate")
    if theirs and _version_numbers(theirs) < _version_numbers(own):
        what = f"accepts this gateway; its release {escape_text(theirs)} is older than {own}"
        return answer, warning("destination", name, what, "upgrade regions before their gateways")
    release = f"release {escape_text(theirs)}" if theirs else "release unknown"
    return answer, ok("destination", name, f"accepts this gateway; {release}")


async def _probe_influx(
    http: httpx.AsyncClient, destination: InfluxDestination, secret: str
) -> tuple[httpx.Response, Finding]:
    name = destination.name
    answer = await http.get(f"{destination.url}/ping")
    release = escape_text(answer.headers.get("X-Influxdb-Version", ""))
    if not answer.is_success:
        return answer, _unexpected(name, answer, "an InfluxDB")
    path, target = "/write", {"db": destination.database or ""}
    if destination.api == "v2":
        path, target = "/api/v2/write", {"org": destination.org or "", "bucket": destination.bucket or ""}
    basic = destination.username and destination.token_file is None
    auth = httpx.BasicAuth(destination.username or "", secret) if basic else httpx.USE_CLIENT_DEFAULT
    answer = await http.post(f"{destination.url}{path}", params=target, content=b"", auth=auth)
    if answer.status_code in (401, 403):
        return answer, _rejected(name, answer, "check token_file: may it write this bucket?")
    if answer.status_code == HTTPStatus.NOT_FOUND:
        what = f"it answers, but does not know this target: {_answer_text(answer)}"
        return answer, fault("destination", name, what, "check org, bucket or database")
    if answer.is_server_error:
        what = f"HTTP {answer.status_code}: {_answer_text(answer)}"
        return answer, fault("destination", name, what, "see the destination's own log")
    known = f"version {release}" if release else "version unknown"
    return answer, ok("destination", name, f"accepts this gateway; {known}")


def _rejected(name: str, answer: httpx.Response, advice: str) -> Finding:
    what = f"HTTP {answer.status_code}: this gateway is rejected: {_answer_text(answer)}"
    return fault("destination", name, what, advice)


def _unexpected(name: str, answer: httpx.Response, expected: str) -> Finding:
    what = f"HTTP {answer.status_code}: not the answer of {expected}: {_answer_text(answer)}"
    return fault("destination", name, what, "check url; a proxy or a login page may answer instead")


def _check_date(name: str, answer: httpx.Response, now_s: float) -> list[Finding]:
    try:
        off_s = now_s - parsedate_to_datetime(answer.headers.get("Date", "")).timestamp()
    except (TypeError, ValueError):
        return []
    if abs(off_s) <= _CLOCK_SKEW_MAX_S:
        return []
    what = f"this clock is {abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} that of {name}"
    return [warning("clock", name, what, "set up NTP on both")]


async def check_broker(
    table: Subscribe, gateway_id: str, *, within_s: float = UPSTREAM_TIMEOUT_S
) -> list[Finding]:
    """Whether a broker accepts this gateway, and with which limits; its session there is not affected."""
    settings = SubscriberOptions(
        url=table.url,
        client_id=f"{table.client_id or f'tidegate-{gateway_id}'}-doctor",
        filters=tuple(table.filters),
        qos=table.qos,
        username=table.username,
        receive_maximum=table.receive_maximum,
        session_expiry_s=table.session_expiry_s,
    )
    name, found = table.name or settings.address.host, []
    plain = not settings.address.tls and not is_loopback(settings.address.host)
    if plain and table.password_file is not None:
        what = "its password is sent unencrypted: url is mqtt://"
        found.append(warning("broker", name, what, "enable TLS there, and use mqtts://"))
    try:
        password = None if table.password_file is None else read_secret(table.password_file).encode()
        async with asyncio.timeout(within_s):
            connack = await _request_connack(table, settings, password)
    except TimeoutError:
        return [*found, fault("broker", name, f"no answer within {within_s:g} s", _UNREACHABLE_ADVICE)]
    except (ssl.SSLError, TlsFileError) as reason:
        return [*found, fault("broker", name, f"TLS: {getattr(reason, 'reason', '') or reason}", _TLS_ADVICE)]
    except (OSError, UnicodeDecodeError) as reason:
        return [*found, fault("broker", name, str(reason), _UNREACHABLE_ADVICE)]
    except (BrokerError, MqttProtocolError) as reason:
        advice = "check username, password_file and the broker's log; it must support MQTT 5"
        return [*found, fault("broker", name, escape_text(str(reason)), advice)]
    granted = BrokerLimits.from_connack(connack, settings)
    found += [
        warning("broker", name, what, "see docs/ingress.md: how to configure a broker")
        for what in find_broker_concerns(settings, granted)
    ]
    for topic_filter in table.filters:
        refusal = granted.refusal_for(topic_filter)
        if refusal is not None:
            what = f"it refuses {escape_text(topic_filter)}: {refusal.name.lower().replace('_', ' ')}"
            found.append(fault("broker", name, what, "use a filter that it accepts"))
    if not found and not table.broker_reviewed:
        what = "accepts this gateway; its queue and persistence settings cannot be checked from here"
        advice = "see docs/ingress.md: how to configure a broker; then set broker_reviewed = true"
        return [warning("broker", name, what, advice)]
    return found or [ok("broker", name, "accepts this gateway")]


async def _request_connack(table: Subscribe, settings: SubscriberOptions, password: bytes | None) -> Connack:
    context = None
    if settings.address.tls:
        context = build_client_context(table.ca_file, table.cert_file, table.key_file)
    reader, writer = await asyncio.open_connection(
        settings.address.host,
        settings.address.port,
        ssl=context,
        server_hostname=(table.server_name or settings.address.host) if context else None,
    )
    try:
        connect = build_connect(settings, password)
        writer.write(encode_packet(msgspec.structs.replace(connect, clean_start=True)))
        parser = PacketParser(max_packet_bytes=1 << 16, topics=TopicCache(), client=True, version=5)
        while data := await reader.read(4096):
            for packet in parser.feed(data):
                if isinstance(packet, Connack):
                    if packet.code:
                        raise build_broker_error("CONNACK", packet.code, packet.properties)
                    ends = {Property.SESSION_EXPIRY_INTERVAL: 0}  # the broker keeps no session
                    writer.write(encode_packet(Disconnect(ReasonCode.SUCCESS, ends)))
                    await writer.drain()
                    return packet
            if parser.fault is not None:
                raise parser.fault
        raise BrokerError("closed", "it closed the connection without an answer")
    finally:
        writer.close()


def _answer_text(answer: httpx.Response) -> str:
    return escape_text(" ".join(answer.text.split()), _ANSWER_MAX_CHARS) or "empty answer"


def _version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version; one without any counts as newest."""
    leading = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, leading[0].split("."))) if leading else (1 << 30,)
