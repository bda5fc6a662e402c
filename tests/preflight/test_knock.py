"""Nodes that knock at each other: who answers, and whose clock is off."""

from __future__ import annotations

import socket
import time

import pytest

from moetrain.preflight.seen import knock as knocking
from moetrain.preflight.seen.knock import Listener, knock, knock_all, own_address


def test_one_that_listens_answers_with_its_clock():
    with Listener() as door:
        clock = knock("127.0.0.1", door.port)
    assert abs(clock.ahead_seconds) <= clock.uncertain_seconds + 1e-3
    assert clock.uncertain_seconds < 1


@pytest.mark.parametrize("ahead", [-90.0, 3.5])
def test_a_clock_that_is_off_is_seen_from_the_other_node(ahead):
    with Listener(now=lambda: time.time() + ahead) as first:
        own, silent = knock_all([(0, "127.0.0.1", first.port), (1, "127.0.0.1", 1)], 1)
    assert silent == {}
    assert own is not None
    # the first node is so far ahead of us: we are so far behind it
    assert own.ahead_seconds == pytest.approx(-ahead, abs=own.uncertain_seconds + 1e-2)


def test_who_does_not_answer_is_named_with_the_reason():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with Listener() as door:
        own, silent = knock_all([(0, "127.0.0.1", door.port), (1, "127.0.0.1", 9), (2, "127.0.0.1", port)], 1)
    assert own is not None
    assert silent == {2: "127.0.0.1: Connection refused"}


def test_one_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(knocking, "KNOCK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        own, silent = knock_all([(0, "127.0.0.1", mute.getsockname()[1]), (1, "127.0.0.1", 9)], 1)
    assert own is None
    assert silent == {0: "127.0.0.1: timed out"}


def test_node_0_has_no_clock_to_compare_with():
    assert knock_all([(0, "127.0.0.1", 9)], 0) == (None, {})


def test_the_own_address_is_that_of_the_way_to_the_master():
    assert own_address("127.0.0.1") == "127.0.0.1"
