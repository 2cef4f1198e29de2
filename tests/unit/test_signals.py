"""A signal ends a command where it is, and is known of where its exception was caught."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tpctl.cli.engine import interrupts
from tpctl.cli.signals import come, end_if_told, take_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_somebody_caught_is_known_of(number: signal.Signals) -> None:
    take_signals()
    assert come() is None
    with pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number
    assert come() == number
    with pytest.raises(SystemExit) as again:
        end_if_told()
    assert again.value.code == 128 + number
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit), interrupts():
        pytest.fail("what runs for long began all the same")
    assert signal.getsignal(signal.SIGINT) is before
    take_signals()
    end_if_told()
    assert come() is None
