"""What the subscriber asks of a broker and reads from its answers, and its memory of QoS 2 exchanges."""

import pytest

from gateway.mqtt.broker_session import (
    BrokerLimits,
    SubscriberOptions,
    build_broker_error,
    build_connect,
    build_subscription_options,
    check_topic_filter,
    find_broker_concerns,
    parse_broker_url,
)
from gateway.mqtt.codec.packets import Connack, Property, Publish, ReasonCode
from gateway.mqtt.session_state import Qos2Exchanges


def settings(**changes):
    return SubscriberOptions(
        **{"url": "mqtt://b", "client_id": "tidegate-g", "filters": ("sensors/#",)} | changes
    )


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        ("mqtt://broker", "broker", 1883, False),
        ("mqtts://broker.example", "broker.example", 8883, True),
        ("mqtt://[::1]:1884/", "::1", 1884, False),
    ],
)
def test_a_broker_has_a_host_a_port_and_perhaps_tls(url, host, port, tls):
    address = parse_broker_url(url)
    assert (address.host, address.port, address.tls) == (host, port, tls)
    assert parse_broker_url(str(address)) == address


@pytest.mark.parametrize(
    "url",
    ["", "broker:1883", "http://b", "mqtt://", "mqtt://me:secret@b", "mqtt://b/topic", "mqtt://b:99999"],
)
def test_what_is_no_broker_address_is_refused(url):
    with pytest.raises(ValueError):  # noqa: PT011 - the words are for people
        parse_broker_url(url)


@pytest.mark.parametrize("name", ["#", "+", "a/+/b", "a/#", "/", "$share/group/a/#", "$SYS/#", "Größe/+"])
def test_a_topic_filter_of_the_specification_is_taken(name):
    check_topic_filter(name)


@pytest.mark.parametrize(
    "name",
    ["", "a#", "#/a", "a/#/b", "a+", "+a/b", "a\0", "$share/g", "$share//a", "$share/g/", "$share/g+/a"],
)
def test_what_is_no_topic_filter_is_refused(name):
    with pytest.raises(ValueError):  # noqa: PT011 - the words are for people
        settings(filters=("ok", name))


def test_connect_resumes_a_session_under_a_stable_name():
    packet = build_connect(settings(username="u", receive_maximum=7, session_expiry_s=9), b"p")
    assert (packet.client_id, packet.clean_start, packet.password) == ("tidegate-g", False, b"p")
    assert packet.properties[Property.SESSION_EXPIRY_INTERVAL] == 9
    assert packet.properties[Property.RECEIVE_MAXIMUM] == 7


@pytest.mark.parametrize(("retained", "options"), [(False, 0x21), (True, 0x11)])
def test_retained_messages_are_asked_for_only_when_wanted(retained, options):
    assert build_subscription_options(settings(retained=retained)) == options


def test_a_broker_that_grants_everything_raises_no_concern():
    assert find_broker_concerns(settings(), BrokerLimits.from_connack(Connack(), settings())) == []


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        (Property.SESSION_EXPIRY_INTERVAL, 3600, "3600 s"),
        (Property.MAXIMUM_QOS, 0, "QoS 0"),
        (Property.RECEIVE_MAXIMUM, 20, "mosquitto's default"),
    ],
)
def test_what_a_broker_cuts_down_raises_a_concern(key, value, word):
    [concern] = find_broker_concerns(
        settings(), BrokerLimits.from_connack(Connack(properties={key: value}), settings())
    )
    assert word in concern


def test_a_filter_that_the_broker_cannot_serve_is_not_sent_to_it():
    limits = {Property.SHARED_SUBSCRIPTION_AVAILABLE: 0, Property.WILDCARD_SUBSCRIPTION_AVAILABLE: 0}
    granted = BrokerLimits.from_connack(Connack(properties=limits), settings())
    assert granted.refusal_for("$share/g/a") == ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
    assert granted.refusal_for("a/#") == ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED
    assert granted.refusal_for("a/b") is None


def test_a_fault_says_the_reason_and_whether_waiting_helps():
    busy = build_broker_error("CONNACK", 0x89, {Property.REASON_STRING: "later\n"})
    assert (busy.kind, busy.needs_operator) == ("server_busy", False)
    assert str(busy) == r"the broker says server busy (0x89, CONNACK): 'later\n'"
    assert build_broker_error("CONNACK", 0x86, {}).needs_operator
    assert "same client id" in str(build_broker_error("DISCONNECT", 0x8E, {}))


class Holder:
    def send_pubrec(self, packet_id):
        raise NotImplementedError


def test_an_exchange_is_repeated_only_by_the_same_message_marked_as_a_duplicate():
    exchanges, first, second = Qos2Exchanges(compare_content=True), Holder(), Holder()
    message = Publish(b"t", b"1", 5, 2)
    assert exchanges.receive(message, first) is None
    repeated = exchanges.receive(Publish(b"t", b"1", 5, 2, dup=True), second)
    assert repeated is not None
    assert not repeated.durable
    assert exchanges.mark_durable(message) is second
    assert exchanges.receive(Publish(b"t", b"2", 5, 2, dup=True), second) is None
    assert exchanges.receive(Publish(b"t", b"2", 5, 2), second) is None


def test_a_message_whose_identifier_was_given_to_another_marks_nothing_durable():
    exchanges, holder = Qos2Exchanges(compare_content=True), Holder()
    old = Publish(b"t", b"1", 5, 2)
    exchanges.receive(old, holder)
    exchanges.receive(Publish(b"t", b"2", 5, 2), holder)
    assert exchanges.mark_durable(old) is None
    exchanges.remove(old)
    assert len(exchanges) == 1
    assert exchanges.release(5) == ReasonCode.PACKET_IDENTIFIER_NOT_FOUND
    assert len(exchanges) == 0
