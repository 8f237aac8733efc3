"""The `subscribe` ingress: a client of an existing MQTT 5 broker, with a persistent session.

The broker has no acknowledgement before the fsync (promise 1), and sends again what it had none for. What it
had not been able to send it keeps in the session, within limits of its own. Connecting again never ends: soon
at first, then with exponential backoff and full jitter, slowly and loudly where only a person can help.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from cloud_sync.runtime.rates import Backoff
from cloud_sync.runtime.watchdog import StageProgress
from gateway.mqtt.broker_session import (
    BROKER_DEFAULTS_WARNING,
    BrokerError,
    BrokerLimits,
    SubscriberCounters,
    build_connect,
    build_subscription_options,
    find_broker_concerns,
)
from gateway.mqtt.client import MqttClient
from gateway.mqtt.codec.packets import ReasonCode
from gateway.mqtt.session_state import Qos2Exchanges

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from gateway.ingress.source import PublishSink
    from gateway.mqtt.broker_session import SubscriberOptions

_log = logging.getLogger(__name__)

_TICK_S: Final = 1.0
_LINGER_S: Final = 2.0
_WATCHDOG_STEP_S: Final = 120.0
_STABLE_CONNECTION_S: Final = 10.0
"""A connection that lasted so long was a good one: the next failure is the first of a new row."""
_RESUBSCRIBE_S: Final = 300.0
_FIRST_FAILURE_CODE: Final = 0x80

RETRY_BACKOFF = Backoff(first_s=0.5, ceiling_s=60.0)
OPERATOR_BACKOFF = Backoff(first_s=15.0, ceiling_s=300.0, floor_s=10.0)
"""Where credentials, certificates, files or the client id have to be changed by somebody."""


class Subscriber:
    """One broker. `run` until told to stop; then, once what was handed over is committed, `close`.

    Args:
        settings: which broker, and what to ask of it.
        intake: takes the publishes.
        backoff: waits between attempts; `slowly` is for those where a person has to help.
        had_session: the broker is known to have had this session before this start.
    """

    def __init__(
        self,
        settings: SubscriberOptions,
        intake: PublishSink,
        *,
        backoff: Backoff = RETRY_BACKOFF,
        slowly: Backoff = OPERATOR_BACKOFF,
        had_session: bool = False,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.settings = settings
        self.counters = SubscriberCounters()
        self.stage = StageProgress(f"subscriber {settings.name}")
        self.had_session = had_session
        self.intake = intake
        self._backoff = backoff
        self._slowly = slowly
        self._chance = chance
        self._qos2_exchanges = Qos2Exchanges()
        self._client: MqttClient | None = None
        self._paused = False
        self._stopping = False
        self._broker_warning_done = settings.broker_reviewed
        self._since_s: float | None = None

    @property
    def in_flight(self) -> int:
        """QoS 1 and 2 publishes of this connection handed over and not answered."""
        return 0 if self._client is None else self._client.in_flight

    async def run(self, stop: asyncio.Event) -> None:
        """Stay connected until `stop` is set, then stop reading; acknowledgements are still written."""
        attending = asyncio.create_task(self._attend(), name=f"broker {self.settings.name}")
        stopping = asyncio.create_task(stop.wait(), name=f"stop of broker {self.settings.name}")
        try:
            await asyncio.wait({attending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            self.stop_reading()
        finally:
            attending.cancel()
            stopping.cancel()
            outcome, _ = await asyncio.gather(attending, stopping, return_exceptions=True)
            self.stage.set_idle()
        if isinstance(outcome, Exception):
            raise outcome

    def pause(self) -> None:
        """Stop reading the broker's socket; the session is kept alive. Harmless when paused."""
        self._paused = True
        if self._client is not None and self.counters.connected:
            self._client.pause()

    def resume(self) -> None:
        """Read again, unless stopping. Harmless when not paused."""
        if not self._stopping:
            self._paused = False
            if self._client is not None:
                self._client.resume()

    def publish(self, topic: bytes, payload: bytes) -> bool:
        """Send one message at QoS 0, if the broker is there; whether it was."""
        client = self._client
        if client is None or client.closing or not client.accepted.done():
            return False
        client.publish(topic, payload)
        return True

    def stop_reading(self) -> None:
        """Read nothing more and connect no more; acknowledgements are still written."""
        self._stopping = True
        self.pause()

    async def close(self, deadline_s: float = _LINGER_S) -> None:
        """Disconnect within the deadline. The broker keeps the session."""
        self._stopping = True
        self.counters.state = "stopped"
        if self._client is not None:
            self._client.leave(BrokerError("stopped", "this gateway stops"))
            await self._client.wait_until_closed(deadline_s)

    async def run_connection(self) -> BrokerError:
        """Connect, subscribe and receive for as long as it lasts; why it did not last longer."""
        self.counters.state, self._since_s = "connecting", None
        try:
            client = await self._connected()
        except BrokerError as fault:
            return fault
        self.counters.state, self._since_s = "connected", _now_s()
        if self._paused:
            client.pause()
        resubscribe_at_s = self._since_s + _RESUBSCRIBE_S
        while not client.lost.done():
            self.stage.begin_step(within_s=_WATCHDOG_STEP_S)
            await asyncio.wait({client.lost}, timeout=min(_TICK_S, client.keep_alive_s / 8 or _TICK_S))
            now_s = _now_s()
            client.tick(now_s)
            if self.counters.refused_filters and now_s >= resubscribe_at_s and not client.lost.done():
                resubscribe_at_s = now_s + _RESUBSCRIBE_S
                self._retry_refused_filters(client)
        await client.wait_until_closed(_LINGER_S)
        return client.lost.result()

    async def _attend(self) -> None:
        attempt = 0
        while True:
            self.stage.begin_step(within_s=self.settings.connect_timeout_s + _WATCHDOG_STEP_S)
            fault = await self.run_connection()
            if self._stopping:
                return
            steady = self._since_s is not None and _now_s() - self._since_s > _STABLE_CONNECTION_S
            attempt = 1 if steady and not fault.needs_operator else attempt + 1
            wait_s = (self._slowly if fault.needs_operator else self._backoff).wait_s(attempt, self._chance())
            self._note(fault, attempt, wait_s)
            self.counters.state = "waiting"
            self.stage.begin_step(within_s=wait_s + _WATCHDOG_STEP_S)
            await asyncio.sleep(wait_s)

    def _note(self, fault: BrokerError, attempt: int, wait_s: float) -> None:
        """Count a fault, and say it when it is new, when a person has to help, and now and then."""
        counters = self.counters
        counters.faults_total[fault.kind] += 1
        said, counters.last_fault = counters.last_fault, str(fault)
        if said != counters.last_fault or fault.needs_operator or attempt & (attempt - 1) == 0:
            _log.log(
                logging.ERROR if fault.needs_operator else logging.WARNING,
                "%s (%s): %s; attempt %d follows in %.1f s",
                *(self.settings.name, self.settings.address, fault, attempt + 1, wait_s),
            )

    # Connecting

    async def _connected(self) -> MqttClient:
        """A client that has CONNACK and SUBACK.

        Raises:
            BrokerFault: it did not come to that.
        """
        address, settings = self.settings.address, self.settings
        client: MqttClient | None = None
        try:
            async with _map_connect_errors(settings), asyncio.timeout(settings.connect_timeout_s):
                connect = build_connect(settings, _read_password(settings.password_file))
                context = _build_tls_context(settings) if address.tls else None
                loop = asyncio.get_running_loop()
                client = MqttClient(settings, connect, self.intake, self._qos2_exchanges, self.counters)
                made = client
                await loop.create_connection(
                    lambda: made,
                    address.host,
                    address.port,
                    ssl=context,
                    server_hostname=(settings.server_name or address.host) if context else None,
                )
                self._client = client
                granted = BrokerLimits.of(await client.answer(client.accepted), settings)
                self._accepted(client, granted)
                await self._subscribe(client, granted)
        except BaseException:
            if client is not None and self._client is client:
                client.abort()
                self._client = None
            raise
        return client

    def _accepted(self, client: MqttClient, granted: BrokerLimits) -> None:
        name, counters = self.settings.name, self.counters
        counters.connects_total += 1
        client.keep_alive_s = granted.keep_alive_s or self.settings.keep_alive_s
        _log.info(
            "%s: connected to %s as %s, %s session",
            *(
                name,
                self.settings.address,
                self.settings.client_id,
                "the old" if granted.session_present else "a new",
            ),
        )
        if self.had_session and not granted.session_present:
            counters.sessions_lost_total += 1
            _log.error(
                "%s: the broker has lost the session of %s: messages it had not delivered may be lost; "
                "was it restarted without persistence, or were we away for longer than it keeps a session?",
                *(name, self.settings.client_id),
            )
        self.had_session = True
        found = tuple(find_broker_concerns(self.settings, granted))
        if found != counters.concerns:
            for concern in found:
                _log.warning("%s: %s", name, concern)
        counters.concerns = found
        if not self._broker_warning_done:
            self._broker_warning_done = True
            _log.warning("%s: %s", name, BROKER_DEFAULTS_WARNING)

    async def _subscribe(self, client: MqttClient, granted: BrokerLimits) -> None:
        """Subscribe to everything.

        Raises:
            BrokerFault: the broker serves none of the filters.
        """
        if self.settings.unsubscribe:
            client.unsubscribe(self.settings.unsubscribe)
        barred = {
            name: code for name in self.settings.filters if (code := granted.refusal_for(name)) is not None
        }
        asked = [name for name in self.settings.filters if name not in barred]
        codes: dict[str, int] = dict(barred)
        if asked:
            suback = await client.answer(client.subscribe(asked, build_subscription_options(self.settings)))
            codes |= zip(asked, suback.codes, strict=False)
        self._subscribed(codes)
        if len(self.counters.refused_filters) == len(self.settings.filters):
            client.leave(BrokerError("no_filter", "left"))
            reasons = "; ".join(f"{name!r}: {why}" for name, why in self.counters.refused_filters.items())
            raise BrokerError("no_filter", f"the broker serves no filter ({reasons})", needs_operator=True)

    def _retry_refused_filters(self, client: MqttClient) -> None:
        """Ask again for what was refused: rights may have been given meanwhile."""
        asked = list(self.counters.refused_filters)
        suback = client.subscribe(asked, build_subscription_options(self.settings))
        suback.add_done_callback(
            lambda done: self._subscribed(dict(zip(asked, done.result().codes, strict=False)))
        )

    def _subscribed(self, codes: dict[str, int]) -> None:
        """Say what the broker has granted and refused."""
        name, refused = self.settings.name, self.counters.refused_filters
        for topic_filter, code in codes.items():
            before = refused.pop(topic_filter, "")
            if code >= _FIRST_FAILURE_CODE:
                refused[topic_filter] = ReasonCode(code).name.lower()
                if refused[topic_filter] != before:
                    _log.error(
                        "%s: the broker refuses the filter %r: %s", name, topic_filter, refused[topic_filter]
                    )
            elif code < self.settings.qos:
                _log.warning("%s: the broker grants %r at QoS %d only", name, topic_filter, code)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _read_password(path: Path | None) -> bytes | None:
    """The first line of a file, as `cloud_sync.runtime.secret_files.read_secret` reads it."""
    return None if path is None else path.read_bytes().partition(b"\n")[0].strip()


def _build_tls_context(settings: SubscriberOptions) -> ssl.SSLContext:
    """TLS as configured, made from the files as they are now, so that renewed ones are used."""
    for path in (settings.ca_file, settings.cert_file, settings.key_file):
        if path is not None:
            path.open("rb").close()  # ssl does not say which file is missing
    try:
        context = ssl.create_default_context(cafile=settings.ca_file)
        if settings.cert_file is not None:
            context.load_cert_chain(
                settings.cert_file, settings.key_file, password=""
            )  # "": never ask for one
    except ssl.SSLError as fault:
        message = f"ca_file, cert_file or key_file cannot be used: {fault.reason or fault}"
        raise BrokerError("file", message, needs_operator=True) from fault
    return context


@asynccontextmanager
async def _map_connect_errors(settings: SubscriberOptions) -> AsyncIterator[None]:
    """What libraries raise while connecting, as `BrokerFault`."""
    try:
        yield
    except TimeoutError:
        raise BrokerError("timeout", f"no answer within {settings.connect_timeout_s:g} s") from None
    except ssl.SSLCertVerificationError as fault:
        message = f"the broker's certificate is not accepted: {fault.verify_message}"
        raise BrokerError("certificate", message, needs_operator=True) from fault
    except ssl.SSLError as fault:
        raise BrokerError("tls", f"TLS: {fault.reason or fault}") from fault
    except UnicodeError:  # from the look-up, of a label that is empty or too long
        raise BrokerError("name_lookup", "the host's name is none", needs_operator=True) from None
    except OSError as fault:
        if fault.filename is not None:
            message = f"{fault.filename} cannot be read: {fault.strerror}"
            raise BrokerError("file", message, needs_operator=True) from fault
        kind = "name_lookup" if isinstance(fault, socket.gaierror) else "unreachable"
        raise BrokerError(kind, f"cannot connect: {fault.strerror or fault}") from fault
