"""The simulator's commands as a person runs them: a real broker, a real PostgreSQL, a real InfluxDB."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiomqtt
import httpx
import pytest

from firmware_sim.ground_truth import ATTRIBUTES, load_ground_truth

ROOT = Path(__file__).parents[2]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIMEOUT_S = 45
TABLE = """CREATE TABLE sensor_data (
    time timestamptz, sensor_id text, sensor_type text, value float8, unit text, quality real,
    battery_level real, signal_strength real, location text, manufacturer text, firmware_version text,
    seq bigint, flags int)"""


def command(*arguments):
    return [sys.executable, "-m", "firmware_sim", *map(str, arguments)]


def sim(*arguments, expect=0):
    done = subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == expect, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def start_sim(*arguments):
    return subprocess.Popen(
        command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end_of(process):
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, (process.returncode, out, err)
    assert "Traceback" not in err, err
    assert "failed to" not in err, err
    return json.loads(out)


def progress_of(folder):
    path = folder / "progress.json"
    return json.loads(path.read_text()) if path.exists() else {}


def wait_until(condition):
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)


def test_a_fleet_outlives_the_death_of_its_broker_under_load(mosquitto, tmp_path):
    truth = tmp_path / "truth"
    process = start_sim(
        "run", "--broker", mosquitto.url, "--truth", truth, "--devices", 30, "--rate", 1500, "--seconds", 4,
        "--readings-per-publish", 3, "--seed", 1, "--json",
    )  # fmt: skip
    wait_until(lambda: progress_of(truth).get("acknowledged", 0) > 500)
    mosquitto.pause()  # publishes pile up unacknowledged
    time.sleep(0.5)
    mosquitto.kill()
    time.sleep(0.5)
    mosquitto.start()
    outcome = end_of(process)
    assert outcome["acknowledged"] == outcome["produced"] > 3000
    assert outcome["publishes_resent"] > 0
    assert outcome["reconnects"] >= 30
    recorded = load_ground_truth(truth)
    assert recorded.rows == outcome["produced"]
    assert recorded.acknowledged.all()
    assert len(set(zip(recorded.series.tolist(), recorded.produced["time_us"].tolist(), strict=True))) == (
        recorded.rows
    )


def test_sigterm_ends_a_run_properly_and_sigkill_leaves_a_readable_record(mosquitto, tmp_path):
    arguments = ("--broker", mosquitto.url, "--devices", 5, "--rate", 500, "--seconds", 0, "--json")
    gentle, harsh = tmp_path / "gentle", tmp_path / "harsh"
    first = start_sim("run", "--truth", gentle, *arguments)
    second = start_sim("run", "--truth", harsh, *arguments)
    wait_until(lambda: min(progress_of(f).get("acknowledged", 0) for f in (gentle, harsh)) > 200)
    first.send_signal(signal.SIGTERM)
    second.kill()
    outcome = end_of(first)
    second.communicate()
    assert load_ground_truth(gentle).acknowledged.sum() == outcome["acknowledged"] == outcome["produced"]
    known = load_ground_truth(harsh)
    assert 200 < known.acknowledged.sum() <= known.rows


def test_a_broker_that_is_not_there_is_named_after_the_connect_timeout(tmp_path):
    for arguments in (
        ("run", "--devices", 2, "--seconds", 1),
        ("replay", write_csv(tmp_path, ["2026-01-01,1"])),
    ):
        done = sim(
            *arguments,
            "--truth",
            tmp_path / "t",
            "--broker",
            "mqtt://127.0.0.1:1",
            "--connect-timeout",
            0.5,
            expect=2,
        )
        assert "mqtt://127.0.0.1:1: not reachable within 0.5 s: [Errno 111] Connection refused" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--truth", "{tmp}", "--broker", "http://x"), "expected mqtt://"),
        (("run", "--truth", "{tmp}", "--rate", "0"), "--rate 0"),
        (("run", "--truth", "{tmp}", "--scenario", "{tmp}/none.toml"), "No such file"),
        (("run", "--truth", "/proc/none"), "--truth /proc/none"),
        (("verify", "--truth", "{tmp}"), "expected one store: --postgres"),
        (("verify", "--truth", "{tmp}", "--postgres", "postgresql://127.0.0.1:1/x"), "no record there"),
        (("replay", "{tmp}/none.csv", "--truth", "{tmp}"), "No such file"),
        (("replay", "{tmp}/none.csv", "--truth", "{tmp}", "--time-format", "later"), "--time-format later"),
    ],
)
def test_a_wrong_argument_is_one_clear_line_and_exit_code_2(tmp_path, arguments, words):
    done = sim(*(argument.format(tmp=tmp_path) for argument in arguments), expect=2)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def write_csv(folder, rows, header="time,value"):
    path = folder / "plant.csv"
    path.write_text("\n".join((header, *rows, "")))
    return path


async def test_a_replayed_file_arrives_value_for_value_and_time_for_time(mosquitto, tmp_path):
    rows = [
        f"2026-01-01T00:00:{n:02d}.{n:06d}+01:00,boiler {n % 3},{n / 7!r},{90 + n / 8}" for n in range(50)
    ]
    path = write_csv(tmp_path, [*rows[:20], "nonsense,x,1,1", *rows[20:]], "time,sensor,value,quality")
    arrived = {}
    async with aiomqtt.Client("127.0.0.1", mosquitto.port) as client:
        await client.subscribe("sensors/#", qos=1)
        process = await asyncio.create_subprocess_exec(
            *command("replay", path, "--broker", mosquitto.url, "--truth", tmp_path / "t", "--json"),
            "--readings-per-publish", "4",
            cwd=ROOT, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(TIMEOUT_S):
            async for message in client.messages:
                readings = json.loads(message.payload)
                for reading in readings if isinstance(readings, list) else [readings]:
                    arrived[message.topic.value, reading["ts"]] = (reading["value"], reading["quality"])
                if len(arrived) == len(rows):
                    break
            out, _ = await process.communicate()
    first_us = int((datetime(2025, 12, 31, 23, tzinfo=UTC) - EPOCH).total_seconds()) * 1_000_000
    assert arrived == {
        (f"sensors/boiler {n % 3}/value", first_us + n * 1_000_001): (n / 7, 90 + n / 8) for n in range(50)
    }
    outcome = json.loads(out)
    assert (outcome["rows"], outcome["sent"], outcome["acknowledged"], outcome["skipped"]) == (51, 50, 50, 1)
    assert outcome["skipped_reasons"][0].startswith(f"{path}:22: time 'nonsense'")
    assert load_ground_truth(tmp_path / "t").acknowledged.all()


def test_a_replay_shifted_to_now_keeps_distances_and_paces_itself(mosquitto, tmp_path):
    path = write_csv(
        tmp_path, ["2020-01-01T00:00:00.25,1", "2020-01-01T00:00:00.75,2", "2020-01-01T00:00:01.5,3"]
    )
    begin_us = time.time_ns() // 1000
    sim("replay", path, "--broker", mosquitto.url, "--truth", tmp_path / "t", "--shift-to-now", "--speed", 1)
    end_us = time.time_ns() // 1000
    times = load_ground_truth(tmp_path / "t").produced["time_us"]
    assert (times - times[0]).tolist() == [0, 500_000, 1_250_000]
    assert begin_us <= times[0] <= end_us
    assert end_us - begin_us >= 1_250_000


def test_a_dry_run_needs_no_broker_and_says_what_it_understood(tmp_path):
    done = sim("replay", write_csv(tmp_path, ["2026-01-01,1.25"]), "--dry-run")
    assert "time: column 'time' as auto" in done.stdout
    assert "line 2: plant/value 2026-01-01T00:00:00.000000Z 1.25" in done.stdout


def test_a_dry_run_prints_json_where_that_is_asked_for(tmp_path):
    path = write_csv(tmp_path, ["2026-01-01,1.25", "2026-01-02,x"])
    (found,) = json.loads(sim("replay", path, "--dry-run", "--json").stdout)["files"]
    assert found["file"] == str(path)
    assert (found["time_columns"], found["sensor_column"], found["sensor_id"]) == (["time"], None, "plant")
    assert found["values"] == [{"column": "value", "type_column": None, "sensor_type": "value"}]
    assert found["first_readings"] == [
        {"line": 2, "series": "plant/value", "time": "2026-01-01T00:00:00.000000Z", "value": 1.25}
    ]
    assert found["skipped_reasons"] == [f"{path}:3: column 'value': 'x' is not a number"]


@pytest.fixture
def recorded(mosquitto, tmp_path):
    """A folder with the record of a small fleet and of a replay with a repeated reading."""
    folder = tmp_path / "truth"
    run = ("--broker", mosquitto.url, "--truth", folder, "--quiet")
    sim("run", *run, "--devices", 4, "--rate", 400, "--seconds", 1, "--readings-per-publish", 2)
    sim("replay", write_csv(tmp_path, ["2026-01-01,1.5", "2026-01-02,2.5", "2026-01-01,9.5"]), *run)
    return folder


def rows_of(truth):
    seen = set()
    for record in truth.produced:
        state = truth.states[record["state"]]
        time_us = int(record["time_us"])
        if (state[:2], time_us) in seen:
            continue
        seen.add((state[:2], time_us))
        named = dict(zip(ATTRIBUTES, state.attributes, strict=True))
        numbers = {n: float(record[n]) for n in ("quality", "battery_level", "signal_strength")}
        yield {
            "time": EPOCH + timedelta(microseconds=time_us),
            "sensor_id": state.sensor_id,
            "sensor_type": state.sensor_type,
            "value": float(record["value"]),
            **named,
            **{name: None if number != number else number for name, number in numbers.items()},  # noqa: PLR0124 - NaN
            "seq": None if record["seq"] < 0 else int(record["seq"]),
            "flags": 0,
        }


async def test_verify_finds_what_is_wrong_in_postgresql(recorded, postgres_dsn):
    import asyncpg  # noqa: PLC0415 - an extra of the package

    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(TABLE)
    truth = load_ground_truth(recorded)
    rows = list(rows_of(truth))
    await connection.copy_records_to_table(
        "sensor_data", records=[tuple(row.values()) for row in rows], columns=list(rows[0])
    )
    await connection.execute(
        "INSERT INTO sensor_data SELECT now(), 'gateway', 'cpu', 1 FROM generate_series(1, 3)"
    )

    async def verify(expect):
        done = await asyncio.to_thread(
            sim, "verify", "--truth", recorded, "--postgres", postgres_dsn, "--json", expect=expect
        )
        return json.loads(done.stdout)

    found = await verify(0)
    assert (found["ok"], found["acknowledged"], found["stored"]) == (True, len(rows), len(rows))
    assert (found["repeated"], found["unknown"]) == (1, 0)

    await connection.execute("DELETE FROM sensor_data WHERE sensor_id = 'sim-0001' AND seq = 2")
    await connection.execute(
        "INSERT INTO sensor_data SELECT * FROM sensor_data WHERE sensor_id = 'sim-0002' AND seq = 3"
    )
    await connection.execute(
        "UPDATE sensor_data SET quality = quality + 0.1 WHERE sensor_id = 'sim-0003' AND seq = 4"
    )
    await connection.execute(
        "UPDATE sensor_data SET location = 'moon' WHERE sensor_id = 'sim-0003' AND seq = 5"
    )
    await connection.execute("UPDATE sensor_data SET value = 9.5 WHERE sensor_id = 'plant' AND value = 1.5")
    await connection.close()
    found = await verify(1)
    assert [found[kind] for kind in ("ok", "lost", "duplicated", "altered", "unknown")] == [False, 1, 1, 3, 0]
    assert "seq 2" in found["examples"]["lost"][0]
    words = " ".join(found["examples"]["altered"])
    assert all(part in words for part in ("quality", "attributes", "value 1.5 was stored as 9.5"))


async def test_verify_says_which_columns_a_table_lacks(recorded, postgres_dsn):
    import asyncpg  # noqa: PLC0415 - an extra of the package

    connection = await asyncpg.connect(postgres_dsn)
    await connection.execute(
        'CREATE TABLE "Data" (time timestamptz, sensor_id varchar, sensor_type varchar, value real)'
    )
    await connection.close()

    def verify(table, expect):
        arguments = ("verify", "--truth", recorded, "--postgres", postgres_dsn, "--table", table)
        return sim(*arguments, expect=expect)

    done = await asyncio.to_thread(verify, "Data", 1)
    assert "note: Data has no quality: it is not compared" in done.stdout
    done = await asyncio.to_thread(verify, "nothing", 2)
    assert 'relation "nothing" does not exist' in done.stderr


def escaped(text):
    return text.replace(" ", r"\ ")


def test_verify_reads_influxdb(recorded, influxd):
    database = influxd.new_database()
    lines = []
    for row in rows_of(load_ground_truth(recorded)):
        tags = "".join(f",{name}={escaped(row[name])}" for name in ATTRIBUTES if row[name])
        fields = "".join(
            f",{n}={row[n]!r}" for n in ("quality", "battery_level", "signal_strength") if row[n] is not None
        )
        fields += f",seq={row['seq']}i" if row["seq"] is not None else ""
        stamp = (row["time"] - EPOCH) // timedelta(microseconds=1) * 1000
        lines.append(
            f"{row['sensor_type']},sensor_id={row['sensor_id']}{tags} value={row['value']!r}{fields} {stamp}"
        )
    write = f"{influxd.url}/write?db={database}"
    httpx.post(write, content="\n".join(lines)).raise_for_status()
    arguments = ("verify", "--truth", recorded, "--influx", influxd.url, "--database", database)
    assert "verify: ok" in sim(*arguments).stdout
    httpx.post(write, content=lines[0].replace(" value=", " value=1")).raise_for_status()
    assert "altered: 1:" in sim(*arguments, expect=1).stdout
    assert "database not found" in sim(*arguments[:-1], "none", expect=2).stderr


def test_the_broken_sensors_scenario_publishes_what_no_record_counts(mosquitto, tmp_path):
    scenario = ROOT / "config" / "scenarios" / "sensor-faults-day.toml"
    arguments = ("--truth", tmp_path, "--scenario", scenario, "--rate", 2000, "--seconds", 1, "--json")
    outcome = json.loads(sim("run", "--broker", mosquitto.url, *arguments).stdout)
    assert outcome["malformed_publishes"] > 0
    recorded = load_ground_truth(tmp_path)
    assert recorded.acknowledged.sum() == outcome["acknowledged"]
    assert recorded.rows == outcome["produced"] == outcome["acknowledged"] + outcome["forgotten"]


def test_a_low_soft_limit_of_open_files_does_not_limit_the_fleet(mosquitto, tmp_path):
    arguments = ("--truth", tmp_path, "--devices", 60, "--rate", 600, "--seconds", 1, "--json")
    run = command("run", "--broker", mosquitto.url, *arguments)
    limited = ["/bin/sh", "-c", 'ulimit -Sn 64; exec "$@"', "sh", *run]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    outcome = json.loads(done.stdout)
    assert outcome["acknowledged"] == outcome["produced"]
    assert outcome["last_fault"] == ""


def test_more_devices_than_open_files_are_allowed_is_said_at_once(tmp_path):
    run = command("run", "--broker", "mqtt://127.0.0.1:1", "--truth", tmp_path, "--devices", 300)
    limited = ["/bin/sh", "-c", 'ulimit -n 200; exec "$@"', "sh", *run]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 2
    assert "the devices need 400 open files and the limit is 200" in done.stderr
