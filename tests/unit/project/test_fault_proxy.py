from __future__ import annotations

from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.fault_proxy import (
    DROP_ANSWER,
    DUPLICATE,
    HALF_CLOSE,
    PASS,
    RESET,
    STALL,
    STALL_ANSWER,
    Fault,
    fault_proxy,
)
from tests.support.http_stub import Answer, answering, http_stub


@pytest.fixture
async def stub():
    async with http_stub(answering(Answer(200, b"0123456789" * 10))) as stub:
        yield stub


@pytest.fixture
async def proxy(stub):
    async with fault_proxy("127.0.0.1", urlsplit(stub.url).port) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy):
    async with httpx.AsyncClient(base_url=proxy.url, timeout=0.3, trust_env=False) as client:
        yield client


async def test_an_unspoiled_exchange_passes_whole_and_keeps_its_connection(stub, proxy, client):
    for _ in range(3):
        answer = await client.post("/x", content=b"a" * 200_000)
        assert answer.content == b"0123456789" * 10
    assert [len(request.body) for request in stub.requests] == [200_000] * 3
    assert len(proxy.exchanges) == 3
    assert len(proxy._connections) == 1


async def test_a_delayed_answer_arrives_after_its_delay(proxy, client):
    proxy.script = [Fault("delay", seconds=0.05), Fault("delay", seconds=5)]
    assert (await client.post("/x")).status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        await client.post("/x")


async def test_a_stalled_request_never_arrives(stub, proxy, client):
    proxy.script = [STALL]
    with pytest.raises(httpx.ReadTimeout):
        await client.post("/x", content=b"lost")
    assert stub.requests == []


async def test_a_stalled_answer_means_the_request_arrived(stub, proxy, client):
    proxy.script = [STALL_ANSWER]
    with pytest.raises(httpx.ReadTimeout):
        await client.post("/x", content=b"stored")
    assert [request.body for request in stub.requests] == [b"stored"]


async def test_a_reset_lets_only_so_many_bytes_through(stub, proxy, client):
    proxy.script = [RESET, Fault("reset", after_bytes=30)]
    for _ in range(2):
        with pytest.raises(httpx.HTTPError):
            await client.post("/x", content=b"lost" * 1000)
    assert stub.requests == []


async def test_a_dropped_answer_means_the_server_did_its_work(stub, proxy, client):
    proxy.script = [DROP_ANSWER]
    with pytest.raises(httpx.HTTPError):
        await client.post("/x", content=b"stored")
    assert [request.body for request in stub.requests] == [b"stored"]
    assert (await client.post("/x")).status_code == 200


async def test_a_half_closed_or_truncated_answer_is_a_broken_one(stub, proxy, client):
    proxy.script = [HALF_CLOSE, Fault("truncate", after_bytes=10), Fault("truncate", after_bytes=70)]
    for _ in range(3):
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/x", content=b"stored")
    assert len(stub.requests) == 3


async def test_a_duplicated_request_reaches_the_server_twice_and_is_answered_once(stub, proxy, client):
    proxy.script = [DUPLICATE]
    answer = await client.post("/x", content=b"twice")
    await proxy.settled()
    assert answer.content == b"0123456789" * 10
    assert [request.body for request in stub.requests] == [b"twice", b"twice"]


async def test_down_refuses_connections_and_up_takes_them_on_the_same_port(proxy, client):
    assert (await client.post("/x")).status_code == 200
    await proxy.down()
    with pytest.raises(httpx.TransportError):
        await client.post("/x")
    await proxy.up()
    assert (await client.post("/x")).status_code == 200


async def test_the_same_seed_spoils_the_same_exchanges(proxy, client):
    drawn = []
    for _ in range(2):
        proxy.at_random(1, {PASS: 1, RESET: 1, DROP_ANSWER: 1})
        start = len(proxy.exchanges)
        for _ in range(12):
            try:
                await client.post("/x")
            except httpx.HTTPError:
                continue
        drawn.append([exchange.fault for exchange in proxy.exchanges[start:]])
    assert drawn[0] == drawn[1]
    assert {fault.kind for fault in drawn[0]} == {"pass", "reset", "drop_answer"}
