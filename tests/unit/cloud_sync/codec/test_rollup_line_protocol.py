"""Rollups, alerts and declarations as line protocol, read back by an independent parser."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from line_protocol_parser import parse_line

from cloud_sync.destinations.influxdb import encode_record_lines
from cloud_sync.model.records import Batch, Series
from tests.support.summary_examples import alerts, declarations, rollups
from tests.support.wire_examples import batch, readings
from tests.support.wire_examples import series as example_series


def parsed(records, named=None):
    named = example_series() if named is None and records.has_series else named or ()
    sent = Batch(batch().range._replace(record_class=records.record_class), named, records)
    return [parse_line(line) for line in encode_record_lines(sent, tags=())]


def test_a_rollup_is_one_point_with_what_identifies_it_as_tags():
    sent = rollups(4, 2)
    points = parsed(sent)

    assert [p["time"] for p in points] == sent.time_us.tolist()
    assert points[0]["tags"] == {
        "gateway_id": batch().range.gateway_id,
        "sensor_id": "sensor-0",
        "sensor_type": "temperature",
        "window_s": "60",
    }
    assert points[0]["fields"]["mean"] == sent.mean[0]
    assert points[0]["fields"]["count"] == sent.count[0]
    assert "mean" not in points[-1]["fields"], "nothing counted there"
    assert points[-1]["fields"]["count"] == 0


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
def test_the_words_of_an_alert_never_break_a_line(words):
    sent = alerts(1)
    sent.detail[0] = words
    (point,) = parsed(sent)

    assert point["fields"]["state"] == "firing"
    assert point["fields"]["detail"] == " ".join(words.splitlines())


@pytest.mark.parametrize("odd", ["a b", "a,b=c", "über", 'quo"te', "back\\slash"])
def test_odd_names_stay_tags(odd):
    (point,) = parsed(alerts(1), (Series(odd, odd),))
    carried = odd

    assert point["tags"]["sensor_id"] == carried
    assert point["tags"]["sensor_type"] == carried


def test_a_declaration_says_what_was_given_up():
    (one, two) = parsed(declarations(2))

    assert one["measurement"] == "declared_loss"
    assert one["tags"]["class"] == "reading"
    assert (one["fields"]["rows"], one["fields"]["last_commit"]) == (100, 10)
    assert one["tags"]["first_commit"] != two["tags"]["first_commit"], "else one would overwrite the other"


def test_readings_are_lines_as_ever():
    (first, *_) = [
        parse_line(line) for line in encode_record_lines(batch(content=readings()), tags=("location",))
    ]
    assert first["measurement"] == "temperature"
    assert math.isfinite(first["fields"]["value"])
    assert np.isfinite(first["time"])
