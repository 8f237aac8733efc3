from __future__ import annotations

import pytest

from gateway.payloads.topics import SeriesName, TopicTemplate, find_series_name_fault


def test_a_topic_names_its_series():
    template = TopicTemplate("site/+1/{sensor_type}/{sensor_id}/up")
    assert template.match("site/+1/temperature/barn.7/up") == SeriesName("barn.7", "temperature")


@pytest.mark.parametrize("topic", ["sensors/a", "sensors/a/b/c", "sensors//b", "xsensors/a/b"])
def test_a_topic_of_another_shape_names_none(topic):
    assert TopicTemplate("sensors/{sensor_id}/{sensor_type}").match(topic) is None


@pytest.mark.parametrize(
    "template",
    [
        "sensors/{sensor_id}",
        "sensors/{sensor_id}/{sensor_id}",
        "s/{sensor_id}/{sensor_type}/{x}",
        "s-{sensor_id}/{sensor_type}",
    ],
)
def test_a_template_without_both_members_is_refused(template):
    with pytest.raises(ValueError, match=r"sensor_id|level"):
        TopicTemplate(template)


def test_names_with_control_characters_or_too_long_cannot_be_stored():
    assert find_series_name_fault(SeriesName("a\x1b[2J", "t")) == "sensor_id holds control characters"
    assert "257 characters" in (find_series_name_fault(SeriesName("a", "t" * 257)) or "")
    assert find_series_name_fault(SeriesName("größe/…", "t")) is None
