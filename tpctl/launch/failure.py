"""From the ends of several ranks to the one error that a person should read."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tpctl import errors
from tpctl.errors import EngineError, TpctlError

_KINDS: dict[str, type[TpctlError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TpctlError)
}
# What a healthy rank says when another one is gone: a consequence, reported only when nothing better is known.
_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out waiting|heartbeat|DistBackendError"
    r"|DistNetworkError|ChannelClosed|NCCL (error|watchdog)|gloo/transport",
    re.IGNORECASE,
)
_CRASHES = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended.

    Attributes:
        rank: its global rank.
        exit_code: the exit status; below 0 the negative number of the signal that killed it.
        message: the exception as "Kind: text", if one was recorded.
        timestamp: when, in seconds since the epoch; whole seconds where torchrun told it.
    """

    rank: int
    exit_code: int
    message: str | None = None
    timestamp: float = 0.0


def read_report(path: Path) -> list[RankFailure]:
    """The failures that ``launch.agent`` wrote; none if it did not come to write them."""
    try:
        return [RankFailure(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def write_report(path: Path, failures: list[RankFailure]) -> None:
    """Write what ``read_report`` reads; whoever reads meanwhile finds the last one, or this one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(failure) for failure in failures]), encoding="utf-8")
    part.replace(path)


def read_error_file(path: Path) -> str | None:
    """The exception that torch.distributed.elastic's ``@record`` wrote, as "Kind: text", if it did."""
    try:
        message = json.loads(path.read_text(encoding="utf-8"))["message"]
        text = message["message"] if isinstance(message, dict) else message
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None


def write_error_file(text: str, env: Mapping[str, str]) -> None:
    """In a rank: leave an exception, as "Kind: text", where its agent looks for one (``read_error_file``), in place of
    what may stand there."""
    if place := env.get("TORCHELASTIC_ERROR_FILE"):
        part = Path(f"{place}.part")
        part.write_text(json.dumps({"message": text}), encoding="utf-8")
        part.replace(place)


def root_cause(failures: list[RankFailure]) -> RankFailure | None:
    """The failure that brought the others about; ``None`` if there was none.

    Times alone do not tell: a rank killed by the kernel leaves no record, and what its peers record about the
    lost connection may carry an earlier second.
    """
    return min(failures, key=lambda failure: (_doubt(failure), failure.timestamp, failure.rank), default=None)


def is_sure(failure: RankFailure) -> bool:
    """Whether this end, the first that is known, cannot be the consequence of another one."""
    return _doubt(failure) <= 1


def was_asked_to_end(failure: RankFailure) -> bool:
    """Whether a rank ended as torchrun ends ranks when another one has failed, or when it is ended itself."""
    return failure.exit_code == -signal.SIGTERM


def is_consequence(text: str) -> bool:
    """Whether an exception ("Kind: text") reads like that of a healthy rank whose peer is gone."""
    return _LOST_PEER.search(text) is not None


def parse_error(text: str) -> TpctlError:
    """The error whose ``"Kind: text"`` form this is; else an ``EngineError`` of the whole text."""
    kind, _, rest = text.partition(": ")
    return _KINDS[kind](rest) if kind in _KINDS else EngineError(text)


def explain(failure: RankFailure, log_tail: str | None, logs: Path) -> TpctlError:
    """One line on a rank's end: what happened, and what to do.

    Args:
        log_tail: the last line that the rank printed; read when no exception was recorded.
        logs: the folder of the ranks' full output, named when there is more to learn from it.
    """
    who = f"rank {failure.rank}"
    if failure.exit_code < 0:
        if -failure.exit_code == signal.SIGKILL:
            return EngineError(
                f"{who} was killed (SIGKILL), as the system does when memory runs out; "
                "free memory, or lower --kv-cache-memory or --max-num-seqs"
            )
        return EngineError(f"{who} was ended by {signal_name(-failure.exit_code)}; its output is in {logs}")
    if failure.message:
        if failure.message.partition(": ")[0] in _KINDS:
            return parse_error(failure.message)
        return EngineError(f"{who} failed: {_first_line(failure.message)}; its output is in {logs}")
    said = f": {log_tail}" if log_tail else " and said nothing"
    return EngineError(f"{who} ended with exit code {failure.exit_code}{said}; its output is in {logs}")


def _doubt(failure: RankFailure) -> int:
    """0 for a sure cause, more for what may be a consequence."""
    if failure.exit_code < 0:
        number = -failure.exit_code
        return 0 if number in _CRASHES else 3 if number != signal.SIGTERM else 5
    if failure.message is None:
        return 2
    return 4 if is_consequence(failure.message) else 1


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "an error without a message"
