"""The `subscribe` ingress: a client of an existing MQTT 5 broker, with a persistent session.

The broker gets no acknowledgement before the fsync (promise 1), and sends again what it had none for. What it
could not send it keeps in the session, within limits of its own. The subscriber reconnects for ever: with
exponential backoff and full jitter, slowly and with errors in the log where an operator has to act.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import socket
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from cloud_sync.runtime.rates import Backoff
from cloud_sync.runtime.secret_files import read_secret
from cloud_sync.runtime.watchdog import StageProgress
from gateway.auth.tls import TlsFileError, build_client_context
from gateway.mqtt.broker_session import (
    BROKER_DEFAULTS_WARNING,
    BrokerError,
    BrokerLimits,
    SubscribeStatus,
    build_connect,
    build_subscription_options,
    find_broker_concerns,
)
from gateway.mqtt.client import MqttClient
from gateway.mqtt.codec.packets import ReasonCode, reason_code_name
from gateway.mqtt.session_state import Qos2Exchanges
from gateway.mqtt.transport import PauseReason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from gateway.ingress.source import PublishSink
    from gateway.mqtt.broker_session import SubscriberOptions

_log = logging.getLogger(__name__)

_TICK_S: Final = 1.0
_LINGER_S: Final = 2.0
_WATCHDOG_STEP_S: Final = 120.0
_STABLE_CONNECTION_S: Final = 10.0
"""After a connection that lasted so long the backoff starts anew."""
_RESUBSCRIBE_S: Final = 300.0

RETRY_BACKOFF = Backoff(first_s=0.5, ceiling_s=60.0)
OPERATOR_BACKOFF = Backoff(first_s=15.0, ceiling_s=300.0, floor_s=10.0)
"""Where credentials, certificates, files or the client id have to be changed."""


class Subscriber:
    """Implements `Source` for one broker. `had_session`: the broker had this session before this start."""

    kind = "subscribe"

    def __init__(
        self,
        options: SubscriberOptions,
        sink: PublishSink,
        *,
        backoff: Backoff = RETRY_BACKOFF,
        operator_backoff: Backoff = OPERATOR_BACKOFF,
        had_session: bool = False,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.name = options.name
        self.options = options
        self.sink = sink
        self.counters = SubscribeStatus(name=options.name)
        self.stages = (StageProgress(f"subscriber {options.name}"),)
        self.had_session = had_session
        self._backoff = backoff
        self._operator_backoff = operator_backoff
        self._chance = chance
        self._exchanges = Qos2Exchanges(compare_content=True)
        self._client: MqttClient | None = None
        self._running: asyncio.Task[None] | None = None
        self._paused = False
        self._stopping = False
        self._defaults_warned = options.broker_reviewed
        self._connected_since_s: float | None = None

    @property
    def in_flight(self) -> int:
        """QoS 1 and 2 publishes of this connection submitted and not answered."""
        return 0 if self._client is None else self._client.window.count

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Stay connected until `stop_reading`."""
        self._running = tasks.create_task(self._run(), name=f"subscriber {self.name}")

    def pause(self) -> None:
        """Stop reading the broker's socket; the session is kept alive. Harmless when paused."""
        self._paused = True
        if self._client is not None and self.counters.connected:
            self._client.transport.pause(PauseReason.BACKPRESSURE)

    def resume(self) -> None:
        """Read again, unless stopping. Harmless when not paused."""
        if not self._stopping:
            self._paused = False
            if self._client is not None:
                self._client.transport.resume(PauseReason.BACKPRESSURE)

    def stop_reading(self) -> None:
        """Read nothing more and connect no more; acknowledgements are still written."""
        self._stopping = True
        self.pause()
        if self._running is not None:
            self._running.cancel()

    async def close(self, deadline_s: float = _LINGER_S) -> None:
        """Disconnect within the deadline. The broker keeps the session."""
        self.stop_reading()
        if self._running is not None:
            await asyncio.wait({self._running})
        self.counters.state = "stopped"
        if self._client is not None:
            self._client.disconnect(BrokerError("stopped", "the gateway is stopping"))
            await self._client.wait_until_closed(deadline_s)

    def status(self) -> SubscribeStatus:
        """Its part of the status document."""
        return copy.deepcopy(self.counters)

    def publish(self, topic: bytes, payload: bytes) -> bool:
        """Send one message at QoS 0, if connected; whether it was."""
        client = self._client
        if client is None or client.transport.closing or not client.accepted.done():
            return False
        client.publish(topic, payload)
        return True

    async def run_connection(self) -> BrokerError:
        """Connect, subscribe and receive for as long as the connection lasts; returns why it ended."""
        self.counters.state, self._connected_since_s = "connecting", None
        try:
            client = await self._connect()
        except BrokerError as error:
            return error
        self.counters.state, self._connected_since_s = "connected", _now_s()
        if self._paused:
            client.transport.pause(PauseReason.BACKPRESSURE)
        resubscribe_at_s = self._connected_since_s + _RESUBSCRIBE_S
        while not client.ended.done():
            self.stages[0].begin_step(within_s=_WATCHDOG_STEP_S)
            await asyncio.wait({client.ended}, timeout=min(_TICK_S, client.keep_alive_s / 8 or _TICK_S))
            now_s = _now_s()
            client.tick(now_s)
            if self.counters.refused_filters and now_s >= resubscribe_at_s and not client.ended.done():
                resubscribe_at_s = now_s + _RESUBSCRIBE_S
                self._retry_refused_filters(client)
        await client.wait_until_closed(_LINGER_S)
        return client.ended.result()

    async def _run(self) -> None:
        stage, attempt = self.stages[0], 0
        try:
            while True:
                stage.begin_step(within_s=self.options.connect_timeout_s + _WATCHDOG_STEP_S)
                error = await self.run_connection()
                since_s = self._connected_since_s
                stable = since_s is not None and _now_s() - since_s > _STABLE_CONNECTION_S
                attempt = 1 if stable and not error.needs_operator else attempt + 1
                backoff = self._operator_backoff if error.needs_operator else self._backoff
                wait_s = backoff.wait_s(attempt, self._chance())
                self._report_failure(error, attempt, wait_s)
                self.counters.state = "waiting"
                stage.begin_step(within_s=wait_s + _WATCHDOG_STEP_S)
                await asyncio.sleep(wait_s)
        finally:
            stage.set_idle()

    def _report_failure(self, error: BrokerError, attempt: int, wait_s: float) -> None:
        """Count an error, and log it when it is new, when an operator has to act, and now and then."""
        counters = self.counters
        counters.faults[error.kind] += 1
        previous, counters.last_fault = counters.last_fault, str(error)
        if previous != counters.last_fault or error.needs_operator or attempt & (attempt - 1) == 0:
            _log.log(
                logging.ERROR if error.needs_operator else logging.WARNING,
                "%s (%s): %s; attempt %d follows in %.1f s",
                *(self.name, self.options.address, error, attempt + 1, wait_s),
            )

    # Connecting

    async def _connect(self) -> MqttClient:
        """A client that has CONNACK and SUBACK; BrokerError when either has not come."""
        options, address = self.options, self.options.address
        client: MqttClient | None = None
        try:
            async with _map_connect_errors(options), asyncio.timeout(options.connect_timeout_s):
                password = context = None
                if options.password_file is not None:
                    password = read_secret(options.password_file).encode()
                if address.tls:  # from the files as they are now, so that renewed ones are used
                    context = build_client_context(options.ca_file, options.cert_file, options.key_file)
                made = client = MqttClient(
                    options, build_connect(options, password), self.sink, self._exchanges, self.counters
                )
                await asyncio.get_running_loop().create_connection(
                    lambda: made.transport,
                    address.host,
                    address.port,
                    ssl=context,
                    server_hostname=(options.server_name or address.host) if context else None,
                )
                self._client = client
                limits = BrokerLimits.from_connack(await client.wait_for(client.accepted), options)
                self._accept(client, limits)
                await self._subscribe(client, limits)
        except BaseException:
            if client is not None and self._client is client:
                client.transport.abort()
                self._client = None
            raise
        return client

    def _accept(self, client: MqttClient, limits: BrokerLimits) -> None:
        name, client_id, counters = self.name, self.options.client_id, self.counters
        counters.connects += 1
        client.keep_alive_s = limits.keep_alive_s or self.options.keep_alive_s
        session = "present" if limits.session_present else "new"
        _log.info("%s: connected to %s as %s, session %s", name, self.options.address, client_id, session)
        if self.had_session and not limits.session_present:
            counters.sessions_lost += 1
            _log.error(
                "%s: the broker has lost the session of %s: messages it had not delivered may be lost; "
                "was it restarted without persistence, or was the gateway away for longer than it keeps one?",
                name,
                client_id,
            )
        self.had_session = True
        concerns = find_broker_concerns(self.options, limits)
        if concerns != counters.concerns:
            for concern in concerns:
                _log.warning("%s: %s", name, concern)
        counters.concerns = concerns
        if not self._defaults_warned:
            self._defaults_warned = True
            _log.warning("%s: %s", name, BROKER_DEFAULTS_WARNING)

    async def _subscribe(self, client: MqttClient, limits: BrokerLimits) -> None:
        """Subscribe to everything; BrokerError when the broker serves none of the filters."""
        options = self.options
        if options.unsubscribe:
            client.unsubscribe(options.unsubscribe)
        codes: dict[str, int] = {
            name: code for name in options.filters if (code := limits.refusal_for(name)) is not None
        }
        offered = [name for name in options.filters if name not in codes]
        if offered:
            suback = await client.wait_for(client.subscribe(offered, build_subscription_options(options)))
            codes |= zip(offered, suback.codes, strict=False)
        self._report_subscriptions(codes)
        refused = self.counters.refused_filters
        if len(refused) == len(options.filters):
            reasons = "; ".join(f"{name!r}: {reason}" for name, reason in refused.items())
            error = BrokerError("no_filter", f"the broker serves no filter ({reasons})", needs_operator=True)
            client.disconnect(error)
            raise error

    def _retry_refused_filters(self, client: MqttClient) -> None:
        """Subscribe again to what was refused: permissions may have been granted meanwhile."""
        filters = list(self.counters.refused_filters)
        suback = client.subscribe(filters, build_subscription_options(self.options))
        suback.add_done_callback(
            lambda done: self._report_subscriptions(dict(zip(filters, done.result().codes, strict=False)))
        )

    def _report_subscriptions(self, codes: Mapping[str, int]) -> None:
        """Log and remember what the broker has granted and refused."""
        name, refused = self.name, self.counters.refused_filters
        for topic_filter, code in codes.items():
            previous = refused.pop(topic_filter, "")
            if code >= ReasonCode.UNSPECIFIED_ERROR:
                reason = refused[topic_filter] = reason_code_name(code)
                if reason != previous:
                    _log.error("%s: the broker refuses the filter %r: %s", name, topic_filter, reason)
            elif code < self.options.qos:
                _log.warning("%s: the broker grants %r at QoS %d only", name, topic_filter, code)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def _map_connect_errors(options: SubscriberOptions) -> AsyncIterator[None]:
    """What libraries raise while connecting, as `BrokerError`."""
    try:
        yield
    except TimeoutError:
        raise BrokerError("timeout", f"no answer within {options.connect_timeout_s:g} s") from None
    except TlsFileError as error:
        raise BrokerError("file", str(error), needs_operator=True) from error
    except ssl.SSLCertVerificationError as error:
        message = f"the broker's certificate is not accepted: {error.verify_message}"
        raise BrokerError("certificate", message, needs_operator=True) from error
    except ssl.SSLError as error:
        raise BrokerError("tls", f"TLS: {error.reason or error}") from error
    except UnicodeError:  # from the look-up, of a label that is empty or too long
        raise BrokerError("name_lookup", "the host name is invalid", needs_operator=True) from None
    except OSError as error:
        if error.filename is not None:
            message = f"{error.filename} cannot be read: {error.strerror}"
            raise BrokerError("file", message, needs_operator=True) from error
        kind = "name_lookup" if isinstance(error, socket.gaierror) else "unreachable"
        raise BrokerError(kind, f"cannot connect: {error.strerror or error}") from error
