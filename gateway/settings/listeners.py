"""`[ingress.listen]`, `[ingress.http]` and `[status]`: addresses, TLS, who may connect."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from cloud_sync.codec.wire import WireLimits
from cloud_sync.http.tokens import TokenFile, TokenFileError
from cloud_sync.runtime.server_sockets import raise_fd_limit
from gateway.auth.authenticator import (
    AnonymousAuthenticator,
    AuthenticationPolicy,
    CredentialsAuthenticator,
    allow_own_sensors,
)
from gateway.auth.device_passwords import PasswordFileError, read_password_file
from gateway.auth.tls import TlsFiles, build_cert_reloader
from gateway.mqtt.context import MqttServerOptions
from gateway.mqtt.server import MqttServer
from gateway.mqtt.session_state import CommandSubscriptions
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.topics import TopicTemplate
from gateway.settings.schema import (
    PORT_BOUND,
    CertificateFile,
    Count,
    FileFault,
    HashesFile,
    KeyFile,
    Port,
    Reloadable,
    Restart,
    Seconds,
    ServerTable,
    SourceContext,
    SourceTable,
    parseable_by,
)
from gateway.spool.received_ledger import IdempotencyKeys, ReceivedLedger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gateway.auth.authenticator import Authenticator
    from gateway.ingress.http.server import HttpSource
    from gateway.ingress.source import PublishSink
    from gateway.payloads.topics import TopicResolver

_log = logging.getLogger(__name__)


class DeviceListener(ServerTable):
    """A server that devices connect to, and how they identify themselves."""

    host: Annotated[str, PORT_BOUND] = "127.0.0.1"
    """The address to listen on; "0.0.0.0" is every IPv4 address of this machine. An address that others can
    reach needs passwords, client certificates, or allow_anonymous = true.
    """
    tls_cert_file: CertificateFile | None = Field(default=None, examples=["server.pem"])
    """The server's certificate with its chain, PEM. A file that changes is read again for new connections."""
    tls_key_file: KeyFile | None = Field(default=None, examples=["server.key"])
    """The key of tls_cert_file, PEM, without a password."""
    client_ca_file: CertificateFile | None = Field(default=None, examples=["devices-ca.pem"])
    """PEM: devices show certificates of these authorities."""
    client_crl_file: CertificateFile | None = Field(default=None, examples=["devices-crl.pem"])
    """PEM: certificates that this list revokes are rejected."""
    client_certificate: Literal["required", "optional"] = "required"
    """"required": no connection without a certificate; with a passwords_file the password is needed as well.
    "optional": a certificate or the password; needs identity = "cn" or "san".
    """
    passwords_file: HashesFile | None = Field(default=None, examples=["passwords"])
    """Names and hashed passwords. `tidegate device add NAME --config FILE` writes it; a running gateway
    notices changes at once.
    """
    identity: Literal["username", "cn", "san"] | None = Field(default=None, examples=["username"])
    """Where a device's name comes from: "username", or its certificate's common name ("cn") or only DNS name
    ("san"). Default: the user name if there is a passwords_file, the common name otherwise.
    """
    publish_as: Literal["self", "any"] | None = Field(default=None, examples=["self"])
    """"self": a device publishes under its own name only, as sensor_id NAME or NAME:part. "any": under every
    name. Default: "self" as soon as there are passwords or client certificates.
    """
    allow_plain_passwords: bool = False
    """Whether passwords may be sent unencrypted, without TLS, to an address that others can reach."""
    allow_anonymous: bool | None = Field(default=None, examples=[False])
    """Whether clients without credentials are accepted; they may publish under any name that is not in
    passwords_file. Default: only if no credentials are configured, which needs host = "127.0.0.1".
    """

    @model_validator(mode="after")
    def _validate_access(self) -> Self:
        """Reject contradictions, and a listener that is open to others without being declared so."""
        self.require_together("tls_cert_file", "tls_key_file")
        faults = [*self._certificate_faults(), *self._anonymity_faults()]
        readable = self.has_client_secrets and self.tls_cert_file is None and not self.is_loopback
        if readable and not self.allow_plain_passwords:
            faults.append(
                f"passwords would cross the network readable on {self.host or 'every address'}: give "
                "tls_cert_file and tls_key_file; if the network itself is trusted, set "
                "allow_plain_passwords = true"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _certificate_faults(self) -> Iterator[str]:
        if self.client_ca_file is not None and self.tls_cert_file is None:
            yield "client_ca_file needs TLS: give tls_cert_file and tls_key_file"
        if self.client_crl_file is not None and self.client_ca_file is None:
            yield "client_crl_file revokes certificates of client_ca_file; give that too"
        if self.named_by != "username":
            if self.client_ca_file is None:
                yield f"identity = {self.named_by!r} needs client_ca_file"
            return
        if not self.has_client_secrets and (self.identity is not None or self.publish_as == "self"):
            yield "nothing identifies a client: give passwords_file, or client_ca_file for certificates"
        if self.client_ca_file is not None and self.client_certificate == "optional":
            yield (
                "optional client certificates that do not identify a client change nothing: set "
                'identity = "cn" or "san", or client_certificate = "required"'
            )

    def _anonymity_faults(self) -> Iterator[str]:
        if self.allow_anonymous is False and not self.authenticates:
            yield "nobody could connect: give passwords_file or client_ca_file, or allow_anonymous = true"
        elif self.allow_anonymous and self.client_ca_file is not None:
            if self.client_certificate == "required":
                yield 'allow_anonymous and client_certificate = "required" contradict each other'
            elif self.own_only:
                yield (
                    "clients without a certificate could publish as any device that has one: set "
                    'publish_as = "any" to accept that, or leave out allow_anonymous'
                )
        elif not (self.authenticates or self.is_loopback or self.allow_anonymous):
            yield (
                f"anyone who reaches {self.host or 'this machine'} could publish anything: give "
                "passwords_file (`tidegate device add` writes it) and TLS, or client_ca_file, or listen on "
                "127.0.0.1; if the network itself is trusted, set allow_anonymous = true"
            )

    @property
    def authenticates(self) -> bool:
        """Whether clients need credentials."""
        return self.has_client_secrets or self.client_ca_file is not None

    @property
    def has_client_secrets(self) -> bool:
        """Whether clients have passwords or tokens."""
        return self.passwords_file is not None

    @property
    def allows_anonymous(self) -> bool:
        """Whether clients without credentials are accepted."""
        return not self.authenticates if self.allow_anonymous is None else self.allow_anonymous

    @property
    def named_by(self) -> Literal["username", "cn", "san"]:
        """Where a device's name comes from."""
        if self.identity is not None:
            return self.identity
        return "cn" if self.client_ca_file is not None and self.passwords_file is None else "username"

    @property
    def own_only(self) -> bool:
        """Whether a device publishes under its own sensor_id only."""
        return self.authenticates if self.publish_as is None else self.publish_as == "self"

    @property
    def tls_files(self) -> TlsFiles | None:
        """The files that the TLS context is made from; None without TLS."""
        if (files := super().tls_files) is None:
            return None
        required = self.client_certificate == "required"
        return replace(
            files, client_ca=self.client_ca_file, client_crl=self.client_crl_file, client_required=required
        )

    def check_files(self) -> Iterator[FileFault]:
        """Whether TLS files and passwords can be used."""
        yield from super().check_files()
        try:
            if self.passwords_file is not None:
                read_password_file(self.passwords_file)
        except PasswordFileError as fault:
            yield FileFault("passwords_file", str(fault))

    def build_authenticator(self, topics: TopicResolver) -> Authenticator:
        """Who may connect; `topics` finds whose readings a topic carries. Raises PasswordFileError."""
        if not self.authenticates:
            return AnonymousAuthenticator()
        policy = AuthenticationPolicy(
            identity=self.named_by,
            allow_anonymous=self.allows_anonymous,
            publish_as_self=self.own_only,
            require_password=self.passwords_file is not None and self.client_certificate == "required",
        )
        return CredentialsAuthenticator(policy, topics, self.passwords_file)


def check_token_file(path: Path | None, command: str) -> Iterator[FileFault]:
    """Whether a file of hashed tokens, which `command` writes, can be used."""
    try:
        if path is not None:
            TokenFile(path, command)
    except TokenFileError as fault:
        yield FileFault("tokens_file", str(fault))


class Listen(DeviceListener, SourceTable):
    """The gateway's own MQTT server."""

    port: Annotated[Port, PORT_BOUND] = 1883
    """The TCP port: 1883 by convention, 8883 with TLS."""
    topic: Annotated[
        str, parseable_by(TopicTemplate), Restart("it decides what connected devices may publish")
    ] = "sensors/{sensor_id}/{sensor_type}"
    """Which series a topic names. One level of the topic for each name in braces."""
    max_connections: Reloadable[Count] = 10_500
    """Further connections are closed at once, or replace one that is not authenticated yet."""
    max_packet_bytes: Reloadable[Annotated[int, Field(ge=128, le=268_435_455)]] = 1 << 20
    """The largest packet accepted."""

    def build_server_options(self) -> MqttServerOptions:
        """The server's options; the soft limit of open files is raised to what they need."""
        files = self.tls_files
        return MqttServerOptions(
            host=self.host,
            port=self.port,
            max_connections=raise_fd_limit(self.max_connections),
            max_packet_bytes=self.max_packet_bytes,
            ssl=None if files is None else build_cert_reloader(files).current,
        )

    def build_server(self, sink: PublishSink, rules: RuleSet | None = None) -> MqttServer:
        """The MQTT server; warns of passwords that are sent unencrypted."""
        if self.passwords_file is not None and self.tls_files is None and not self.is_loopback:
            _log.warning(
                "passwords are sent unencrypted: %s:%d has no TLS (tls_cert_file, tls_key_file)",
                self.host,
                self.port,
            )
        topics = rules or RuleSet(TopicTemplate(self.topic))
        return MqttServer(
            self.build_server_options(), sink, self.build_authenticator(topics), CommandSubscriptions(topics)
        )

    def build_source(self, context: SourceContext) -> MqttServer:
        """The MQTT server."""
        return self.build_server(context.committer, context.rules)


_DEVICE_COMMAND = "tidegate device token NAME"
_ByteLimit = Annotated[int, Field(ge=1024)]


class Http(DeviceListener, SourceTable):
    """The gateway's own HTTP server for readings: devices without MQTT, and other gateways."""

    enabled: bool = False
    """Whether to accept readings over HTTP."""
    port: Port = 8422
    """The TCP port."""
    tokens_file: HashesFile | None = Field(default=None, examples=["http-tokens"])
    """Names and hashed tokens. `tidegate device token NAME --config FILE` writes them: one of scope "batches"
    lets the gateway of that name deliver here, one of scope "readings" lets a client send readings under its
    name.
    """
    max_connections: Count = 1000
    """Requests on further connections are answered with 503."""
    max_requests: Count = 64
    """Requests with a body in progress; further ones are asked to retry later (503)."""
    max_requests_each: Count = 8
    """The same for one client (429)."""
    max_body_bytes: _ByteLimit = 8 << 20
    """The largest body accepted, as sent."""
    max_plain_bytes: _ByteLimit = 32 << 20
    """The largest body of readings, decompressed."""
    max_plain_rows: Count = 100_000
    """Readings in one such body."""
    max_batch_rows: Count = 200_000
    """Records in one batch of another gateway."""
    process_batches: bool = False
    """Whether readings in batches of other gateways get rollups and alerts here as well; for gateways that
    send readings only.
    """
    max_buffered_bytes: _ByteLimit = 64 << 20
    """Memory for all bodies together; further requests are asked to retry later (503)."""
    body_idle_s: Seconds = 30
    """The longest silence within a request."""
    answer_within_s: Seconds = 30
    """How long a request may wait for its commit; then it is asked to retry later (503)."""
    retry_after_s: Count = 5
    """How long a rejected request is asked to wait."""

    @property
    def has_client_secrets(self) -> bool:
        """Whether clients have passwords or tokens."""
        return super().has_client_secrets or self.tokens_file is not None

    def check_files(self) -> Iterator[FileFault]:
        """Whether TLS files, passwords and tokens can be used."""
        yield from super().check_files()
        yield from check_token_file(self.tokens_file, _DEVICE_COMMAND)

    def build_source(self, context: SourceContext) -> HttpSource:
        """The HTTP server for readings."""
        from cloud_sync.http import auth, requests  # noqa: PLC0415 - a web server, only where this is enabled
        from gateway.ingress.http import batches, readings, server  # noqa: PLC0415

        committer, spool = context.committer, context.spool
        app = server.HttpApp(
            gateway_id=context.gateway_id,
            authenticator=auth.RequestAuthenticator(
                None if self.tokens_file is None else TokenFile(self.tokens_file, _DEVICE_COMMAND),
                partial(server.identify_device, self.build_authenticator(context.rules.template)),
                allow_own_sensors if self.own_only else lambda _: auth.allow_any_sensor,
            ),
            admission=requests.RequestAdmission(
                requests.RequestLimits(
                    max_body_bytes=self.max_body_bytes,
                    max_plain_bytes=self.max_plain_bytes,
                    max_plain_rows=self.max_plain_rows,
                    max_requests=self.max_requests,
                    max_requests_each=self.max_requests_each,
                    max_buffered_bytes=self.max_buffered_bytes,
                    body_idle_s=self.body_idle_s,
                    retry_after_s=self.retry_after_s,
                )
            ),
            committer=committer,
            batches=batches.BatchReceiver(
                committer, spool.appender, ReceivedLedger(spool.database), process=self.process_batches
            ),
            readings=readings.ReadingReceiver(
                committer, IdempotencyKeys(spool.database), max_rows=self.max_plain_rows
            ),
            limits=WireLimits(max_rows=self.max_batch_rows),
            answer_within_s=self.answer_within_s,
        )
        tls = None if self.tls_files is None else build_cert_reloader(self.tls_files)
        options = server.HttpServerOptions(self.host, self.port, self.max_connections, tls)
        return server.HttpSource(options, app, stop_within_s=context.stop_within_s)


class StatusSettings(ServerTable):
    """The gateway's own HTTP endpoint for people and probes."""

    enabled: bool = True
    """Whether to serve it. `tidegate status` reads from it."""
    host: str = "127.0.0.1"
    """The address to serve it on; 127.0.0.1 is this machine only. Others need tokens and TLS."""
    port: Port = 8421
    """Its TCP port."""
    tokens_file: HashesFile | None = Field(default=None, examples=["status.tokens"])
    """Hashes of the tokens that other machines need. `tidegate token add NAME` writes it; a running gateway
    notices changes at once.
    """
    tls_cert_file: CertificateFile | None = Field(default=None, examples=["server.pem"])
    """The server's certificate with its chain, PEM. A file that changes is read again for new connections."""
    tls_key_file: KeyFile | None = Field(default=None, examples=["server.key"])
    """The key of tls_cert_file, PEM, without a password."""
    allow_plain: bool = False
    """Whether tokens may be sent unencrypted: only where something else encrypts, such as a VPN."""
    silent_after_s: Seconds = 300
    """A device that has sent nothing for so long is shown as silent."""

    @model_validator(mode="after")
    def _validate_access(self) -> Self:
        self.require_together("tls_cert_file", "tls_key_file")
        if not self.enabled or self.is_loopback:
            return self
        faults = []
        if self.tokens_file is None:
            faults.append(
                f"anyone who reaches {self.host or 'this machine'} could read the status: give tokens_file "
                "(`tidegate token add` writes it), or use host 127.0.0.1"
            )
        if self.tls_cert_file is None and not self.allow_plain:
            faults.append(
                "tokens would be sent unencrypted: give tls_cert_file and tls_key_file, or set "
                "allow_plain = true where something else encrypts"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def check_files(self) -> Iterator[FileFault]:
        """Whether TLS files and tokens can be used."""
        yield from super().check_files()
        yield from check_token_file(self.tokens_file, "tidegate token add NAME")
