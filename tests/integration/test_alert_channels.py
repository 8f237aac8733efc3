"""Webhook, e-mail and log against servers that speak the real protocols."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from contextlib import asynccontextmanager

import pytest

from cloud_sync.model.records import AlertState, Severity
from gateway.alerts.channels import MailChannel, MailServer, WebhookChannel
from gateway.alerts.notifier import ChannelError, LogChannel, build_message
from gateway.spool.processing_state import AlertExample, AlertNotice
from tests.support.certificates import Authority
from tests.support.free_ports import free_port
from tests.support.http_stub import Answer, answering, http_stub
from tests.support.smtp_server import mail_server

AT_US = 1_790_000_000_000_000
MESSAGE = build_message(
    "barn-1",
    [
        AlertNotice(
            "hot",
            Severity.CRITICAL,
            AlertState.FIRING,
            1,
            (AlertExample("kiln ß", "temperature", AT_US, 36.5, 35.0, 2, "value 36.5 is above 35"),),
        )
    ],
)
TEXT = "CRITICAL: hot of kiln ß/temperature at barn-1\nkiln ß/temperature: value 36.5 is above 35"


async def test_a_webhook_gets_what_chat_services_take():
    async with http_stub(answering(Answer(200, "ok"))) as stub:
        channel = WebhookChannel("ops", f"{stub.url}/hook?x=1")
        await channel.send(MESSAGE)
        await channel.aclose()
        (request,) = stub.requests
        assert (request.method, request.path, request.query) == ("POST", "/hook", {"x": "1"})
        assert request.headers["content-type"] == "application/json"
        assert json.loads(request.body) == {"text": TEXT}


async def test_a_webhook_gets_the_whole_message_and_its_token_where_asked_for():
    async with http_stub(answering(Answer(204))) as stub:
        channel = WebhookChannel("ops", stub.url, form="json", token="t0ken")
        await channel.send(MESSAGE)
        await channel.aclose()
        (request,) = stub.requests
        assert request.headers["authorization"] == "Bearer t0ken"
        assert json.loads(request.body) == {
            "text": TEXT,
            "gateway_id": "barn-1",
            "rule": "hot",
            "severity": "critical",
            "firing": 1,
            "recovered": 0,
            "alerts": [
                {
                    "state": "firing",
                    "sensor_id": "kiln ß",
                    "sensor_type": "temperature",
                    "at_us": AT_US,
                    "value": 36.5,
                    "threshold": 35.0,
                    "count": 2,
                    "detail": "value 36.5 is above 35",
                }
            ],
        }


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(500), "it answered 500"),
        (Answer(302, headers={"location": "http://127.0.0.1:1/elsewhere"}), "it answered 302"),
        (Answer(raw=b"nonsense\r\n\r\n"), "no answer (RemoteProtocolError)"),
        (Answer(200, hang_s=20), "no answer (ReadTimeout)"),
    ],
)
async def test_a_webhook_that_does_not_take_it_is_a_fault_without_its_address(answer, words):
    async with http_stub(answering(answer)) as stub:
        channel = WebhookChannel("ops", f"{stub.url}/s3cret", timeout_s=0.5)
        with pytest.raises(ChannelError) as fault:
            await channel.send(MESSAGE)
        await channel.aclose()
        assert str(fault.value) == words


async def test_a_webhook_nobody_listens_at_is_a_fault():
    channel = WebhookChannel("ops", f"http://127.0.0.1:{free_port()}/")
    with pytest.raises(ChannelError, match="ConnectError"):
        await channel.send(MESSAGE)
    await channel.aclose()


def mail(port: int, **options) -> MailChannel:
    server = MailServer("127.0.0.1", port, timeout_s=5, **{"tls": "none", **options})
    return MailChannel("mail", server, "barn-1@plant.example", ("ops@plant.example", "boss@plant.example"))


async def test_a_mail_says_it_in_subject_and_text_to_everyone():
    async with mail_server() as mailbox:
        await mail(mailbox.port).send(MESSAGE)
        (got,) = mailbox.mails
        assert got["Subject"] == TEXT.splitlines()[0]
        assert got.get_content().splitlines() == TEXT.splitlines()
        assert (got["From"], got["Auto-Submitted"]) == ("barn-1@plant.example", "auto-generated")
        assert got["Message-ID"].endswith("@plant.example>")
        assert mailbox.recipients == [["ops@plant.example", "boss@plant.example"]]


async def test_a_mail_goes_encrypted_and_with_a_password(tmp_path):
    authority = Authority(tmp_path, "ca")
    certificate = authority.issue("server", "localhost", "IP:127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    trust = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    async with mail_server(tls=context, password=("barn-1", "pa55")) as mailbox:
        options = {"tls": "starttls", "username": "barn-1", "context": trust}
        await mail(mailbox.port, password="pa55", **options).send(MESSAGE)
        assert len(mailbox.mails) == 1
        with pytest.raises(ChannelError, match="535") as fault:
            await mail(mailbox.port, password="wrong", **options).send(MESSAGE)
        assert "wrong" not in str(fault.value)


async def test_a_mail_server_that_cannot_be_trusted_gets_nothing(tmp_path):
    authority = Authority(tmp_path, "ca")
    certificate = authority.issue("server", "localhost", "IP:127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    async with mail_server(tls=context) as mailbox:
        with pytest.raises(ChannelError):
            await mail(mailbox.port, tls="starttls").send(MESSAGE)
        assert mailbox.mails == []


async def test_a_mail_server_that_refuses_or_is_away_is_a_fault():
    async with mail_server() as mailbox:
        mailbox.refuse = "451 not now"
        with pytest.raises(ChannelError, match="not now"):
            await mail(mailbox.port).send(MESSAGE)
    with pytest.raises(ChannelError, match=r"127\.0\.0\.1"):
        await mail(free_port()).send(MESSAGE)


async def test_the_log_has_one_line_a_message(caplog):
    caplog.set_level(logging.INFO)
    await LogChannel().send(MESSAGE)
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [
        ("gateway.alerts", "ERROR", TEXT.replace("\n", " | "))
    ]


@pytest.mark.parametrize("name", ["a\u2028b", "a\r\nBcc: x@y.example", "a\x85b", "\ud800"])
async def test_a_mail_about_a_device_whose_name_would_end_a_header_is_sent(name):
    example = AlertExample(name, "t", AT_US, 1.0, 2.0, 1, "value 1 is below 2")
    message = build_message(
        "barn-1", [AlertNotice("cold", Severity.WARNING, AlertState.FIRING, 1, (example,))]
    )
    async with mail_server() as mailbox:
        await mail(mailbox.port).send(message)
        (got,) = mailbox.mails
        assert got["Subject"].startswith("WARNING: cold of ")
        assert got["Subject"].endswith("/t at barn-1")
        assert got["Bcc"] is None


@asynccontextmanager
async def dripping(head: bytes):
    """The port of a server that answers with `head` and then a byte at a time, for long."""
    ended = asyncio.Event()

    async def answer(reader, writer):
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            for _ in range(200):
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.05)
        except OSError:
            pass
        finally:
            writer.close()
            ended.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        await ended.wait()


@pytest.mark.parametrize(
    ("head", "taken"), [(b"HTTP/1.1 200 OK\r\n\r\n", True), (b"HTTP/1.1 200 OK\r\nx: ", False)]
)
async def test_a_webhook_whose_answer_has_no_end_is_not_waited_for(head, taken):
    async with dripping(head) as port:
        channel = WebhookChannel("ops", f"http://127.0.0.1:{port}", timeout_s=0.2)
        async with asyncio.timeout(5):
            with contextlib.nullcontext() if taken else pytest.raises(ChannelError, match="no answer"):
                await channel.send(MESSAGE)
        await channel.aclose()
