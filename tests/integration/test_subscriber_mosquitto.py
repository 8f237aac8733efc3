"""The subscriber with a real broker, Debian's mosquitto, and publishers that count."""

import asyncio
import shutil
import signal
import subprocess
from contextlib import asynccontextmanager, suppress

import aiomqtt
import pytest
import uvloop

from cloud_sync.runtime.rates import Backoff
from gateway.mqtt.broker_session import SubscriberOptions
from gateway.mqtt.subscriber import Subscriber
from tests.support.tasks import LooseTasks

TIMEOUT_S = 25
SOON = Backoff(0.05, 0.2, 0.02)
TOPIC = "sensors/a/t"


class Committing:
    """An intake that acknowledges a moment later, as a committer does, unless told to hold."""

    def __init__(self, *, holding=False):
        self.taken = []
        self.owed = []
        self.holding = holding

    def submit_publishes(self, source, batch):
        self.taken += batch
        self.owed.append((source, batch))
        if not self.holding and len(self.owed) == 1:
            asyncio.get_running_loop().call_later(0.002, self.commit)

    def commit(self):
        owed, self.owed = self.owed, []
        for source, batch in owed:
            source.acknowledge(batch)

    @property
    def payloads(self):
        return [publish.payload for publish in self.taken]


@asynccontextmanager
async def subscribing(url, *, client_id="tidegate-g", holding=False, filters=("sensors/#",), **settings):
    asked = SubscriberOptions(url=url, client_id=client_id, filters=filters, broker_reviewed=True, **settings)
    subscriber = Subscriber(asked, Committing(holding=holding), backoff=SOON, operator_backoff=SOON)
    await subscriber.start(LooseTasks())
    try:
        yield subscriber
    finally:
        await subscriber.close()


@asynccontextmanager
async def subscribed(url, **settings):
    async with subscribing(url, **settings) as subscriber:
        await until(lambda: subscriber.counters.state == "connected")
        yield subscriber


async def until(condition):
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event of its own
            await asyncio.sleep(0.01)


async def publish(port, payloads, *options, qos=1, topic=TOPIC):
    """Publish one message a payload with mosquitto_pub; every one is acknowledged when this returns."""
    program = shutil.which("mosquitto_pub")
    if program is None:
        pytest.skip("needs mosquitto_pub (Debian package mosquitto-clients)")
    process = await asyncio.create_subprocess_exec(
        *(program, "-h", "127.0.0.1", "-p", str(port), "-V", "mqttv5", "-q", str(qos), "-t", topic, "-l"),
        *options,
        stdin=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        await process.communicate(b"".join(payload + b"\n" for payload in payloads))
    assert process.returncode == 0


def numbers(count, start=0):
    return [b"%d" % number for number in range(start, start + count)]


def configured(mosquitto, *lines):
    """The same broker, restarted with more lines in its configuration."""
    mosquitto.kill()
    mosquitto._config.write_text(mosquitto._config.read_text() + "\n".join(lines) + "\n")
    mosquitto.start()
    return mosquitto


@pytest.mark.parametrize("loop_factory", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_every_message_of_every_qos_arrives_once_and_in_order(mosquitto, loop_factory):
    async def main():
        async with subscribed(mosquitto.url, qos=2) as subscriber:
            for qos, count in ((0, 500), (1, 5000), (2, 500)):
                subscriber.sink.taken.clear()
                await publish(mosquitto.port, numbers(count), qos=qos)
                await until(lambda count=count: len(subscriber.sink.taken) >= count)
                assert subscriber.sink.payloads == numbers(count)
                assert {p.qos for p in subscriber.sink.taken} == {qos}
            await until(lambda: subscriber.in_flight == 0)
            assert subscriber.counters.acknowledged == 5500
            assert subscriber.counters.protocol_faults.total() == 0
            await until(lambda: len(subscriber._exchanges) == 0)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(asyncio.wait_for(main(), TIMEOUT_S))


@pytest.mark.parametrize("qos", [1, 2])
async def test_what_was_received_and_not_committed_is_delivered_again(mosquitto, qos):
    async with subscribed(mosquitto.url, qos=qos, holding=True) as killed:
        await publish(mosquitto.port, numbers(300), qos=qos)
        await until(lambda: len(killed.sink.taken) == 300)
        assert killed.counters.acknowledged == 0
        killed._client.transport.abort()  # as a SIGKILL of the gateway would
        killed.stop_reading()
        await asyncio.wait_for(killed._client.closed, TIMEOUT_S)
    async with subscribed(mosquitto.url, qos=qos) as successor:
        await until(lambda: len(successor.sink.taken) >= 300)
        assert successor.sink.payloads == numbers(300)
        await until(lambda: successor.counters.acknowledged == 300)
    async with subscribed(mosquitto.url, qos=qos) as third:
        await publish(mosquitto.port, [b"after"], qos=qos)
        await until(lambda: third.sink.taken)
        assert third.sink.payloads == [b"after"]


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_connection_lost_during_a_commit_costs_nothing(mosquitto, qos):
    async with subscribed(mosquitto.url, qos=qos, holding=True) as subscriber:
        await publish(mosquitto.port, numbers(100), qos=qos)
        await until(lambda: len(subscriber.sink.taken) == 100)
        subscriber._client.transport.abort()
        await until(lambda: subscriber.counters.connects == 2)
        if qos == 1:
            await until(lambda: len(subscriber.sink.taken) == 200)
        else:
            await until(lambda: subscriber.counters.again == 100)
        subscriber.sink.holding = False
        subscriber.sink.commit()
        await publish(mosquitto.port, [b"after"], qos=qos)
        await until(lambda: b"after" in subscriber.sink.payloads and subscriber.in_flight == 0)
        distinct = list(dict.fromkeys(subscriber.sink.payloads))
        assert distinct == [*numbers(100), b"after"]
        assert len(subscriber.sink.taken) == (201 if qos == 1 else 101)
        await until(lambda: len(subscriber._exchanges) == 0)


async def test_the_broker_sends_no_more_than_the_receive_maximum_before_an_acknowledgement(mosquitto):
    async with subscribed(mosquitto.url, receive_maximum=30, holding=True) as subscriber:
        await publish(mosquitto.port, numbers(200))
        await until(lambda: len(subscriber.sink.taken) == 30)
        await asyncio.sleep(0.2)
        assert len(subscriber.sink.taken) == 30
        subscriber.sink.holding = False
        subscriber.sink.commit()
        await until(lambda: len(subscriber.sink.taken) == 200)
        assert subscriber.sink.payloads == numbers(200)


async def test_a_broker_that_exceeds_the_receive_maximum_is_read_no_further(mosquitto):
    """mosquitto 2.0.11 forgets the limit with the first acknowledgements."""
    async with subscribed(mosquitto.url, receive_maximum=30, holding=True, keep_alive_s=1) as subscriber:
        await publish(mosquitto.port, [b"x" * 2000] * 3000)
        await until(lambda: len(subscriber.sink.taken) == 30)
        subscriber.sink.commit()
        await until(lambda: len(subscriber.sink.taken) > 30)
        await asyncio.sleep(1.5)
        assert len(subscriber.sink.taken) < 400
        subscriber.sink.holding = False
        subscriber.sink.commit()
        await until(lambda: len(subscriber.sink.taken) == 3000)
        assert subscriber.counters.connects == 1


async def test_a_paused_subscriber_reads_nothing_and_stays_connected(mosquitto):
    async with subscribed(mosquitto.url, receive_maximum=65_535, keep_alive_s=1) as subscriber:
        subscriber.pause()
        await publish(mosquitto.port, [b"x" * 2000] * 3000)
        await asyncio.sleep(2.5)
        assert subscriber.sink.taken == []
        subscriber.resume()
        await until(lambda: len(subscriber.sink.taken) == 3000)
        assert subscriber.counters.connects == 1


async def test_what_is_published_while_the_gateway_is_away_is_there_when_it_comes_back(mosquitto):
    async with subscribed(mosquitto.url):
        pass
    await publish(mosquitto.port, numbers(3000))
    async with subscribed(mosquitto.url) as subscriber:
        await until(lambda: len(subscriber.sink.taken) == 3000)
        assert subscriber.sink.payloads == numbers(3000)


async def counting_publisher(port, acknowledged, stop):
    """Publishes numbers one by one, each again until the broker has acknowledged it."""
    number = 0
    while not stop.is_set():
        with suppress(aiomqtt.MqttError):
            async with aiomqtt.Client("127.0.0.1", port, timeout=2) as client:
                while not stop.is_set():
                    await client.publish(TOPIC, b"%d" % number, qos=1)
                    acknowledged.append(number)
                    number += 1
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_broker_restarted_under_load_is_found_again(mosquitto, tmp_path, how):
    """What mosquitto acknowledged after its last autosave and had not passed on is lost in mosquitto itself
    by a SIGKILL. It is not lost here, and after a SIGTERM nothing may be."""
    configured(mosquitto, "persistence true", f"persistence_location {tmp_path}/", "autosave_interval 1")
    async with subscribed(mosquitto.url) as subscriber:
        saved = tmp_path / "mosquitto.db"
        await until(lambda: saved.exists() and b"sensors/#" in saved.read_bytes())
        acknowledged: list[int] = []
        stop = asyncio.Event()
        publisher = asyncio.create_task(counting_publisher(mosquitto.port, acknowledged, stop))
        await until(lambda: len(acknowledged) > 500)
        mosquitto._process.send_signal(how)
        await asyncio.to_thread(mosquitto._process.wait)
        at_kill = len(acknowledged)
        await until(lambda: not subscriber.counters.connected)
        mosquitto.start()
        await until(lambda: len(acknowledged) > at_kill + 500)
        stop.set()
        await publisher
        await until(lambda: subscriber.sink.payloads[-1:] == [b"%d" % acknowledged[-1]])
        await until(lambda: subscriber.in_flight == 0)
        arrived = set(map(int, subscriber.sink.payloads))
        lost = [number for number in acknowledged if number not in arrived]
        assert all(number < at_kill for number in lost)
        assert len(lost) < 50
        assert how is signal.SIGKILL or not lost
        assert subscriber.counters.sessions_lost == 0
        assert subscriber.counters.connects == 2


async def test_a_broker_that_forgets_its_sessions_is_accused_of_it(mosquitto, caplog):
    async with subscribed(mosquitto.url) as subscriber:
        mosquitto.kill()
        await until(lambda: not subscriber.counters.connected)
        mosquitto.start()
        await until(lambda: subscriber.counters.connected)
        assert subscriber.counters.sessions_lost == 1
        assert "has lost the session of tidegate-g" in caplog.text
        await publish(mosquitto.port, [b"1"])
        await until(lambda: subscriber.sink.payloads == [b"1"])


async def test_the_stock_configuration_of_mosquitto_is_recognised(mosquitto):
    async with subscribed(mosquitto.url) as subscriber:
        assert "mosquitto's default" in subscriber.counters.concerns[0]
    configured(mosquitto, "max_inflight_messages 0")
    async with subscribed(mosquitto.url) as subscriber:
        assert subscriber.counters.concerns == []


async def test_members_of_a_shared_subscription_share_the_messages(mosquitto):
    shared = {"filters": ("$share/gateways/sensors/#",)}
    async with (
        subscribed(mosquitto.url, client_id="one", **shared) as one,
        subscribed(mosquitto.url, client_id="two", **shared) as two,
    ):
        await publish(mosquitto.port, numbers(1000))
        await until(lambda: len(one.sink.taken) + len(two.sink.taken) == 1000)
        assert sorted(one.sink.payloads + two.sink.payloads) == sorted(numbers(1000))
        assert one.sink.taken
        assert two.sink.taken


async def test_retained_messages_are_skipped_unless_asked_for_and_then_come_once(mosquitto):
    await publish(mosquitto.port, [b"old"], "-r")
    async with subscribed(mosquitto.url, client_id="plain") as subscriber:
        await publish(mosquitto.port, [b"live"])
        await until(lambda: subscriber.sink.taken)
        assert subscriber.sink.payloads == [b"live"]
    for expected in ([b"old", b"live"], [b"live"]):
        async with subscribed(mosquitto.url, client_id="curious", retained=True) as subscriber:
            await publish(mosquitto.port, [b"live"])
            await until(lambda expected=expected: len(subscriber.sink.taken) >= len(expected))
            assert subscriber.sink.payloads == expected


async def test_a_filter_given_up_is_unsubscribed_from_the_session(mosquitto):
    async with subscribed(mosquitto.url, filters=("old/#", "sensors/#")):
        pass
    async with subscribed(mosquitto.url, unsubscribe=("old/#",)) as subscriber:
        await publish(mosquitto.port, [b"1"], topic="old/a")
        await publish(mosquitto.port, [b"2"])
        await until(lambda: subscriber.sink.taken)
        assert subscriber.sink.payloads == [b"2"]


async def test_a_second_gateway_under_the_same_client_id_is_suspected(mosquitto):
    """mosquitto 2.0.11 closes the older connection without the DISCONNECT that would say so."""
    async with subscribed(mosquitto.url) as first, subscribing(mosquitto.url):
        await until(lambda: first.counters.last_fault)
        assert "another client use the id 'tidegate-g'" in first.counters.last_fault


async def test_a_wrong_password_is_a_fault_until_it_is_corrected(mosquitto, tmp_path):
    passwords, secret = tmp_path / "passwords", tmp_path / "secret"
    if shutil.which("mosquitto_passwd") is None:
        pytest.skip("needs mosquitto_passwd (Debian package mosquitto)")
    words = ("mosquitto_passwd", "-c", "-b", passwords, "gate", "right")
    await asyncio.to_thread(subprocess.run, words, check=True)
    configured(mosquitto, f"password_file {passwords}", "allow_anonymous false")
    secret.write_text("wrong\n")
    async with subscribing(mosquitto.url, username="gate", password_file=secret) as subscriber:
        await until(lambda: subscriber.counters.faults["not_authorized"] >= 2)
        assert not subscriber.counters.connected
        secret.write_text("right\n")
        await until(lambda: subscriber.counters.connected)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A private authority with a server's and a client's certificate, and another authority."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "stranger"):
        subject = ("-subj", f"/CN={name}", "-days", "2")
        openssl("req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.pem", *subject)
    (folder / "names").write_text("subjectAltName=DNS:broker.example\n")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-out", f"{name}.pem", "-days", "2", "-extfile", "names"),
        )
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


async def test_tls_with_a_private_authority_and_a_client_certificate(mosquitto, certificates):
    configured(
        mosquitto,
        f"cafile {certificates}/ca.pem",
        f"certfile {certificates}/server.pem",
        f"keyfile {certificates}/server.key",
        "require_certificate true",
    )
    url = f"mqtts://127.0.0.1:{mosquitto.port}"
    own = {"cert_file": certificates / "client.pem", "key_file": certificates / "client.key"}
    private = {"ca_file": certificates / "ca.pem", "server_name": "broker.example"}
    async with subscribed(url, **private, **own) as subscriber:
        subscriber.sink.holding = True
        await publish(
            mosquitto.port,
            numbers(2000),
            *("--cafile", certificates / "ca.pem", "--insecure"),
            *("--cert", certificates / "client.pem", "--key", certificates / "client.key"),
        )
        await until(lambda: len(subscriber.sink.taken) == 2000)
        subscriber.sink.commit()
        assert subscriber.in_flight == 0
    refused = [
        ({"server_name": "broker.example", "ca_file": certificates / "stranger.pem"} | own, "certificate"),
        ({"ca_file": certificates / "ca.pem"} | own, "certificate"),  # the name is not the address
        (private | {"cert_file": certificates / "client.pem", "key_file": certificates / "ca.key"}, "file"),
        (private | {"ca_file": certificates / "missing.pem"}, "file"),
        (private, "broken"),  # without the certificate that the broker demands
    ]
    for settings, kind in refused:
        asked = SubscriberOptions(url=url, client_id="g", filters=("a",), **settings)
        fault = await Subscriber(asked, Committing()).run_connection()
        assert fault.kind == kind, fault


async def test_close_tells_the_broker_and_leaves_it_the_session(mosquitto):
    async with subscribed(mosquitto.url) as subscriber:
        pass
    assert subscriber._client.closed.done()
    async with subscribing(mosquitto.url) as again:
        again.had_session = True
        await until(lambda: again.counters.connected)
        assert again.counters.sessions_lost == 0
