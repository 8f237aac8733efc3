"""`tidegate ingest` as a process: what it prints, how it ends, what it survives."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import httpx
import pytest

from cloud_sync.destinations.ingest_client import IngestClient
from cloud_sync.model.records import Receipt
from cloud_sync.timescale.schema import load_migrations
from tests.support.wire_examples import batch

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "cloud_sync.ingest"]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def write_config(folder: Path, dsn: str, more: str = "") -> Path:
    path = folder / "ingest.toml"
    path.write_text(f'tokens_file = "tokens"\n{more}\n[listen]\nport = 0\n[database]\ndsn = "{dsn}"\n')
    return path


@contextmanager
def served(config: Path, *, by: str = "--config") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running service and its address; killed if it is still there at the end."""
    arguments = [by, str(config)] if by == "--config" else [by, "--config", str(config)]
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("tidegate ingest: listening on http://127.0.0.1:")
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("by", ["--config", "serve"])
async def test_a_term_signal_finishes_the_requests_accepted_and_exits_with_0(postgres_dsn, tmp_path, by):
    config = write_config(tmp_path, postgres_dsn)
    token = run("token", "add", "gw-1", "--config", config).stdout.strip()
    with served(config, by=by) as (process, url):
        client = IngestClient("region", url, token)
        assert await client.send(client.encode(batch(1))) == Receipt(12, 12)
        blocker = await asyncpg.connect(postgres_dsn)
        await blocker.execute("BEGIN; LOCK TABLE ingest_ledger IN EXCLUSIVE MODE")
        sending = asyncio.create_task(client.send(client.encode(batch(2))))
        async with httpx.AsyncClient() as http:
            while "tidegate_ingest_requests 1.0" not in (await http.get(f"{url}/metrics")).text:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert process.poll() is None
        await blocker.close()

        assert (await sending).duplicates == 12
        assert await asyncio.to_thread(process.wait, 10) == 0
        await client.aclose()


def test_a_second_service_on_the_same_port_says_so_and_exits_with_2(postgres_dsn, tmp_path):
    config = write_config(tmp_path, postgres_dsn)
    run("token", "add", "gw-1", "--config", config)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run("serve", "--config", config, TIDEGATE_INGEST_LISTEN__PORT=str(port))

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_service_that_boots_before_its_database_waits_for_it(own_postgres_server, tmp_path):
    config = write_config(tmp_path, own_postgres_server.dsn())
    token = run("token", "add", "gw-1", "--config", config).stdout.strip()
    own_postgres_server.kill()
    with served(config) as (process, url):
        away = httpx.get(f"{url}/readyz")
        assert (away.status_code, away.json()["error"]) == (503, "database_away")
        own_postgres_server.start()
        deadline = time.monotonic() + 20
        while httpx.get(f"{url}/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert process.poll() is None
    assert token


WRONG = {
    "missing": (None, ["ingest.toml: there is no such file"]),
    "no TOML": ("a = = 1", ["ingest.toml: is not valid TOML"]),
    "two faults": (
        'tokens_file = "t"\n[database]\ndsn = "x"\n[listen]\nport = "x"\nhots = 1',
        ["listen.port: 'x'", "did you mean 'host'?"],
    ),
    "no database": ('tokens_file = "t"\n', ["database: is missing; allowed: a [database] table"]),
    "no dsn": ('tokens_file = "t"\n[database]\n', ["database: exactly one of dsn and dsn_file"]),
    "no dsn file": (
        'tokens_file = "t"\n[database]\ndsn_file = "no"\n',
        ["database.dsn_file", "no cannot be read: No such file"],
    ),
    "no tokens": (
        'tokens_file = "no"\n[database]\ndsn = "postgresql://x"\n',
        ["no: there is no such file", "token add"],
    ),
    "other dsn": (
        'tokens_file = "t"\n[database]\ndsn = "mysql://secret@x"\n',
        ["database.dsn", "postgresql://"],
    ),
}


@pytest.mark.parametrize(("config", "words"), WRONG.values(), ids=WRONG)
def test_a_configuration_that_cannot_work_is_told_in_words_with_exit_2(tmp_path, config, words):
    path = tmp_path / "ingest.toml"
    (tmp_path / "t").write_text("")
    if config is not None:
        path.write_text(config)

    ended = run("--config", path)

    assert ended.returncode == 2
    for word in words:
        assert word in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "secret" not in ended.stderr


def test_a_database_of_a_newer_release_ends_the_service_with_exit_2(postgres_dsn, tmp_path):
    config = write_config(tmp_path, postgres_dsn)
    run("token", "add", "gw-1", "--config", config)
    migrated = run("migrate", "--config", config)
    assert migrated.returncode == 0
    names = [migration.name for migration in load_migrations()]
    assert migrated.stdout == f"schema {len(names)} on plain PostgreSQL: {', '.join(names)}\n"
    again = run("migrate", "--config", config)
    assert again.stdout == f"schema {len(names)} on plain PostgreSQL: nothing to do\n"
    asyncio.run(_pretend_newer(postgres_dsn))

    for command in ("serve", "migrate"):
        ended = run(command, "--config", config)
        assert ended.returncode == 2
        assert "the database has schema version 900" in ended.stderr
        assert "Traceback" not in ended.stderr


async def _pretend_newer(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute("INSERT INTO schema_migration (version, name) VALUES (900, 'later')")
    await connection.close()


def test_tokens_are_added_listed_and_revoked(tmp_path):
    file = tmp_path / "tokens"
    first = run("token", "add", "gw-1", "--tokens-file", file)
    second = run("token", "add", "gw-1", "--tokens-file", file)
    run("token", "add", "gw-2", "--tokens-file", file)

    assert first.returncode == 0
    assert len(first.stdout.strip()) >= 43
    assert first.stdout != second.stdout
    assert run("token", "list", "--tokens-file", file).stdout == "gw-1  2 tokens\ngw-2  1 token\n"
    assert run("token", "revoke", "gw-1", "--tokens-file", file).stdout == "gw-1: 2 tokens revoked\n"
    again = run("token", "revoke", "gw-1", "--tokens-file", file)
    assert (again.returncode, again.stderr) == (1, "tidegate ingest: gw-1 has no token\n")
    bad = run("token", "add", "a b", "--tokens-file", file)
    assert bad.returncode == 2
    assert "no gateway_id" in bad.stderr
    assert run("token", "list").returncode == 2
