"""A signal ends a command where it is, and is known of where its exception was caught."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tpctl import start
from tpctl.cli import app as app_module
from tpctl.cli import signals
from tpctl.cli.engine import interrupts
from tpctl.cli.signals import come, end_if_told, take_signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    signals._came.clear()
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


@pytest.mark.parametrize("left", [(), ("3 finished rows are in x.partial, go on with --resume",)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_command_is_said(
    number: signal.Signals, left: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        except SystemExit as error:
            for one in left:
                error.add_note(one)
            raise

    monkeypatch.setattr(app_module, "_command", work)
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == "; ".join(["tpctl: interrupted", *left]) + "\n"


def test_one_that_came_during_the_imports_ends_a_command_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether an import let its exception through or not."""
    take_signals()
    with suppress(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr("sys.argv", ["tpctl", "--version"])
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    assert (ended.value.code, *capsys.readouterr()) == (143, "", "tpctl: interrupted\n")

    class Finder:
        def find_spec(self, name: str, *rest: object) -> None:
            if name == "tpctl.cli.app":
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.delitem(sys.modules, "tpctl.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        start.main()
    assert (ended.value.code, *capsys.readouterr()) == (143, "", "tpctl: interrupted\n")
