"""Checks of what the gateway talks to: destinations and brokers. Nothing is written there."""

from __future__ import annotations

import asyncio
import ssl
import time
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

import httpx

from cloud_sync.destinations.http_client import http_client
from cloud_sync.masking import masked_text
from gateway.ingress.broker import BrokerFault, Granted, coded_fault, concerns
from gateway.ingress.encoder import encode
from gateway.ingress.packets import (
    Connack,
    Connect,
    Disconnect,
    Property,
    ProtocolFault,
    ReasonCode,
    TopicTable,
)
from gateway.ingress.parser import Parser
from gateway.ingress.subscription import SubscribeSettings
from gateway.operate.doctor.finding import Finding, fault, ok, warning
from gateway.operate.terminal import shown
from gateway.settings import HttpDestination, InfluxDestination, IngestDestination, secret_of
from gateway.settings.tables import is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.settings import AnyDestination, GatewaySettings, Subscribe

ANSWER_S: Final = 10.0
_OFF_S: Final = 30.0
_SHOWN: Final = 200


async def check_upstreams(settings: GatewaySettings) -> list[Finding]:
    """Ask every destination and every broker, all at once."""
    asked = [check_destination(d, settings.gateway_id) for d in settings.destinations]
    asked += [check_broker(table, settings.gateway_id) for table in settings.ingress.subscribe]
    return [finding for found in await asyncio.gather(*asked) for finding in found]


async def check_destination(
    destination: AnyDestination,
    gateway_id: str,
    *,
    clock_s: Callable[[], float] = time.time,
    within_s: float = ANSWER_S,
) -> list[Finding]:
    """Whether a destination can be reached, takes this gateway, and what release it is."""
    if not isinstance(destination, HttpDestination):
        return []  # a folder is looked at as one
    name = destination.name
    try:
        secret = "" if destination.secret_file is None else secret_of(destination.secret_file)
        options = destination.http_options()
    except (OSError, UnicodeDecodeError) as reason:
        return [
            fault("destination", name, f"{reason}", "correct the file that is named; see the checks above")
        ]
    asked = _Asked(destination, gateway_id, clock_s)
    found = asked.in_the_clear(secret=bool(secret))
    secure = destination.url.startswith("https:")
    async with http_client(
        options, secure=secure, timeout=within_s, headers=_headers(destination, secret)
    ) as http:
        try:
            if isinstance(destination, IngestDestination):
                found += await asked.ingest(http)
            elif isinstance(destination, InfluxDestination):
                found += await asked.influx(http, destination, secret)
        except httpx.TimeoutException:
            found.append(fault("destination", name, f"no answer within {within_s:g} s", _REACH))
        except (httpx.HTTPError, httpx.StreamError, ssl.SSLError) as reason:
            found.append(_unreached(name, reason))
    return found


_REACH = "check address, routes and firewalls; readings wait in the spool meanwhile"
_TLS = "check ca_file (who signed the server's certificate), the name in url, and the clock"
_RENEW = "have the region give a new token (tidegate ingest token add), put it into token_file"


class _Asked:
    """The questions to one destination, and what their answers mean."""

    def __init__(self, destination: HttpDestination, gateway_id: str, clock_s: Callable[[], float]) -> None:
        self._destination, self._gateway_id, self._clock_s = destination, gateway_id, clock_s
        self._name = destination.name

    def in_the_clear(self, *, secret: bool) -> list[Finding]:
        url = urlsplit(self._destination.url)
        if not secret or url.scheme == "https" or is_loopback(url.hostname or ""):
            return []
        what = "its token crosses the network readable: url is http://"
        return [warning("destination", self._name, what, "have it speak TLS, and say https://")]

    async def ingest(self, http: httpx.AsyncClient) -> list[Finding]:
        answer = await http.get(f"{self._destination.url}/v1/gateways/{quote(self._gateway_id, safe='')}")
        if answer.status_code in (401, 403):
            return [*self._date(answer), self._refused(answer, _RENEW)]
        if not answer.is_success or "epochs" not in _json(answer):
            return [self._stranger(answer, "a Tidegate ingest service")]
        theirs, own = answer.headers.get("Tidegate-Version", ""), version("tidegate")
        found = self._date(answer)
        if theirs and _release(theirs) < _release(own):
            what = f"takes this gateway; its release {shown(theirs)} is older than {own}"
            return [*found, warning("destination", self._name, what, "upgrade regions before their gateways")]
        release = f"release {shown(theirs)}" if theirs else "release not told"
        return [*found, ok("destination", self._name, f"takes this gateway; {release}")]

    async def influx(self, http: httpx.AsyncClient, given: InfluxDestination, secret: str) -> list[Finding]:
        pinged = await http.get(f"{given.url}/ping")
        release = pinged.headers.get("X-Influxdb-Version", "")
        if not pinged.is_success:
            return [self._stranger(pinged, "an InfluxDB")]
        if given.api == "v2":
            path, target = "/api/v2/write", {"org": given.org or "", "bucket": given.bucket or ""}
        else:
            path, target = "/write", {"db": given.database or ""}
        basic = (
            httpx.BasicAuth(given.username, secret) if given.username and given.token_file is None else None
        )
        answer = await http.post(
            f"{given.url}{path}", params=target, content=b"", auth=basic or httpx.USE_CLIENT_DEFAULT
        )
        if answer.status_code in (401, 403):
            return [*self._date(answer), self._refused(answer, "check token_file: may it write this bucket?")]
        if answer.status_code == HTTPStatus.NOT_FOUND:
            what = f"it answers, but not for this target: {_words(answer)}"
            return [
                *self._date(answer),
                fault("destination", self._name, what, "check org, bucket or database"),
            ]
        if answer.is_server_error:
            what = f"HTTP {answer.status_code}: {_words(answer)}"
            return [fault("destination", self._name, what, "look into the destination's own log")]
        known = f"version {shown(release)}" if release else "version not told"
        return [*self._date(answer), ok("destination", self._name, f"takes this gateway; {known}")]

    def _refused(self, answer: httpx.Response, advice: str) -> Finding:
        what = f"HTTP {answer.status_code}: this gateway is not accepted: {_words(answer)}"
        return fault("destination", self._name, what, advice)

    def _stranger(self, answer: httpx.Response, expected: str) -> Finding:
        what = f"HTTP {answer.status_code}: what answers is not {expected}: {_words(answer)}"
        return fault(
            "destination", self._name, what, "check url; a proxy or a login page may answer in its place"
        )

    def _date(self, answer: httpx.Response) -> list[Finding]:
        """Whether the destination's clock agrees with this machine's."""
        try:
            off_s = self._clock_s() - parsedate_to_datetime(answer.headers.get("Date", "")).timestamp()
        except (TypeError, ValueError):
            return []
        if abs(off_s) <= _OFF_S:
            return []
        what = (
            f"this clock is {abs(off_s):.0f} s {'ahead of' if off_s > 0 else 'behind'} that of {self._name}"
        )
        return [warning("clock", self._name, what, "set up NTP on both")]


async def check_broker(table: Subscribe, gateway_id: str, *, within_s: float = ANSWER_S) -> list[Finding]:
    """Whether a broker can be reached and takes this gateway, and what it grants. The session is not touched:
    the question is asked under another client id, with a clean start.
    """
    settings = SubscribeSettings(
        url=table.url,
        client_id=f"{table.client_id or f'tidegate-{gateway_id}'}-doctor",
        filters=tuple(table.filters),
        qos=table.qos,
        receive_maximum=table.receive_maximum,
        session_expiry_s=table.session_expiry_s,
    )
    name, found = table.name or settings.address.host, []
    if (
        table.password_file is not None
        and not settings.address.tls
        and not is_loopback(settings.address.host)
    ):
        what = "its password crosses the network readable: url is mqtt://"
        found.append(warning("broker", name, what, "have it speak TLS, and say mqtts://"))
    try:
        password = None if table.password_file is None else secret_of(table.password_file).encode()
        async with asyncio.timeout(within_s):
            connack = await _connack(table, settings, password)
    except TimeoutError:
        return [*found, fault("broker", name, f"no answer within {within_s:g} s", _REACH)]
    except ssl.SSLError as reason:
        return [*found, fault("broker", name, f"TLS: {reason.reason or reason}", _TLS)]
    except (OSError, UnicodeDecodeError) as reason:
        return [*found, fault("broker", name, str(reason), _REACH)]
    except (BrokerFault, ProtocolFault) as reason:
        advice = "check username and password_file, and what the broker's log says; it has to speak MQTT 5"
        return [*found, fault("broker", name, shown(str(reason)), advice)]
    granted = Granted.of(connack, settings)
    found += [
        warning("broker", name, what, "see docs/ingress.md: how to set a broker")
        for what in concerns(settings, granted)
    ]
    for topic_filter in table.filters:
        barred = granted.bars(topic_filter)
        if barred is not None:
            words = f"it does not serve {shown(topic_filter)}: {barred.name.lower().replace('_', ' ')}"
            found.append(fault("broker", name, words, "use a filter that it serves"))
    if not found and not table.broker_reviewed:
        what = "takes this gateway; its queue and its persistence cannot be seen from here"
        advice = "see docs/ingress.md: how to set a broker; then broker_reviewed = true"
        return [warning("broker", name, what, advice)]
    return found or [ok("broker", name, "takes this gateway")]


async def _connack(table: Subscribe, settings: SubscribeSettings, password: bytes | None) -> Connack:
    """What the broker answers to a CONNECT."""
    context = None
    if settings.address.tls:
        context = ssl.create_default_context(cafile=table.ca_file)
        if table.cert_file is not None:
            context.load_cert_chain(table.cert_file, table.key_file, password=lambda: "")
    reader, writer = await asyncio.open_connection(
        settings.address.host,
        settings.address.port,
        ssl=context,
        server_hostname=(table.server_name or settings.address.host) if context else None,
    )
    try:
        asked: dict[Property, Any] = {Property.SESSION_EXPIRY_INTERVAL: settings.session_expiry_s}
        writer.write(
            encode(
                Connect(
                    settings.client_id,
                    clean_start=True,
                    keep_alive_s=60,
                    username=table.username,
                    password=password,
                    properties=asked,
                )
            )
        )
        parser = Parser(max_packet_bytes=1 << 16, topics=TopicTable(), client=True, version=5)
        while data := await reader.read(4096):
            for packet in parser.feed(data):
                if isinstance(packet, Connack):
                    if packet.code:
                        raise coded_fault("CONNACK", packet.code, packet.properties)
                    ends = {Property.SESSION_EXPIRY_INTERVAL: 0}  # the broker is to keep nothing of this
                    writer.write(encode(Disconnect(ReasonCode.SUCCESS, ends)))
                    await writer.drain()
                    return packet
            if parser.fault is not None:
                raise parser.fault
        raise BrokerFault("closed", "it closes the connection without an answer")
    finally:
        writer.close()


def _unreached(name: str, reason: Exception) -> Finding:
    words = masked_text(str(reason)) or type(reason).__name__
    return fault("destination", name, words, _TLS if "SSL" in words or "certificate" in words else _REACH)


def _headers(destination: HttpDestination, secret: str) -> dict[str, str]:
    if not secret or (isinstance(destination, InfluxDestination) and destination.token_file is None):
        return {}
    word = "Bearer" if isinstance(destination, IngestDestination) else "Token"
    return {"Authorization": f"{word} {secret}"}


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return ()


def _words(answer: httpx.Response) -> str:
    """The beginning of an answer, safe to print."""
    return shown(" ".join(answer.text.split()), _SHOWN) or "without a word"


def _release(text: str) -> tuple[int, ...]:
    """The numbers a version begins with; a version that has none is as good as any."""
    numbers = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers) or (1 << 30,)
