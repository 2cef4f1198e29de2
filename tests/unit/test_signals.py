"""A signal ends a command where it is, and is known of where its exception was caught."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tpctl.cli.signals import has_come, take_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_somebody_caught_is_known_of(number: signal.Signals) -> None:
    take_signals()
    assert not has_come()
    with pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number
    assert has_come()
    take_signals()
    assert not has_come()
