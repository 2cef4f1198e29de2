"""The process in which a chat template runs: ``python -m tpctl.client.template_worker``.

A template is somebody else's program. Jinja's sandbox keeps it from reaching out, but not from multiplying a string to
gigabytes, or from looping for ever, and nothing can stop it while it does. So it runs here, where the system ends it:
an alarm after ``SECONDS``, and no more than ``MEMORY`` bytes beside what the interpreter needs.

Requests and answers are JSON objects, each behind its length in four bytes; see ``answer``.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from tpctl.client.tools.json_value import encoded

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 10.0
"""For one request: a real template takes less than a millisecond."""
MEMORY = 512 << 20
LONGEST = 1 << 18
"""Characters of a rendered text beside eight times those of the messages and of what is given with them. The longest
templates in use have 30,000; what a template may write of its own must not be long to tokenise."""

NO_MEMORY = 77
"""Exit code where there is no memory left to say so."""

SIZE = struct.Struct("!I")
_MESSAGE = 1000  # characters of what a template says of itself


def environment() -> ImmutableSandboxedEnvironment:
    """What transformers lets chat templates use, so that the text equals transformers' byte for byte."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}…{% endgeneration %}`` marks an answer, for training; here just its body."""

        tags = {"generation"}  # noqa: RUF012 — as Jinja declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML characters, which a model was never shown.
        return encoded(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = strftime_now
    return made


class Worker:
    """Holds the template that was compiled last."""

    def __init__(self) -> None:
        self._environment = environment()
        self._template: Template | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do what is asked.

        Args:
            request: ``compile``: a template's source; or ``render``: the variables to render it with, and ``each``: for
                every text to make, variables of its own.

        Returns:
            ``texts`` (of several, those that fail are null), or what ``Uses`` holds; or ``failed`` ("refused" by the
            template itself, "memory", "length" or "error") with ``message``.
        """
        from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError

        try:
            if "compile" in request:
                return self._compile(request["compile"])
            common, each = request["render"], request["each"]
            one = len(each) == 1
            return {"texts": [(self._render if one else self._tried)(common, own) for own in each]}
        except _TooLong as error:
            return {"failed": "length", "message": str(error)}
        except MemoryError:
            return {"failed": "memory", "message": ""}
        except TemplateSyntaxError as error:
            return {"failed": "error", "message": f"line {error.lineno}: {error.message}"[:_MESSAGE]}
        except (UndefinedError, SecurityError) as error:
            return {"failed": "error", "message": str(error)[:_MESSAGE]}
        except TemplateError as error:
            return {"failed": "refused", "message": str(error)[:_MESSAGE]}
        except Exception as error:  # somebody else's program may raise anything
            return {"failed": "error", "message": f"{type(error).__name__}: {error}"[:_MESSAGE]}

    def _compile(self, source: str) -> dict[str, Any]:
        from tpctl.client.template_uses import uses

        self._template = None
        found = uses(self._environment.parse(source))
        self._template = self._environment.from_string(source)
        return found

    def _render(self, common: Mapping[str, Any], own: Mapping[str, Any]) -> str:
        assert self._template is not None
        text = self._template.render({**common, **own})
        longest = LONGEST + 8 * sum(map(len, _strings(own)))
        if len(text) > longest:
            raise _TooLong(f"{len(text):,} characters, more than {longest:,}")
        return text

    def _tried(self, common: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            return self._render(common, own)
        except Exception:
            return None  # whoever wants to know why asks for it alone


class _TooLong(Exception):
    """A text that no conversation of that length becomes."""


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def receive(stream: IO[bytes]) -> dict[str, Any] | None:
    """The next request or answer; ``None`` at the end."""
    size = stream.read(SIZE.size)
    if len(size) < SIZE.size:
        return None
    (length,) = SIZE.unpack(size)
    body = stream.read(length)
    return json.loads(body) if len(body) == length else None


def frame(value: Mapping[str, Any]) -> bytes:
    """A request or an answer as bytes. Half surrogate pairs stay what they are."""
    body = json.dumps(value).encode()
    return SIZE.pack(len(body)) + body


def limit_memory(more: int) -> None:
    """To so many bytes of addresses beside those that this process has."""
    import resource

    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        used = 1 << 30  # no Linux
    for kind, size in ((resource.RLIMIT_AS, used + more), (resource.RLIMIT_CORE, 0)):
        _, most = resource.getrlimit(kind)
        wanted = size if most == resource.RLIM_INFINITY else min(size, most)
        try:
            resource.setrlimit(kind, (wanted, wanted))
        except (OSError, ValueError):  # macOS refuses limits of memory
            continue


@contextmanager
def tied() -> Iterator[None]:
    """While a request is answered: when the other end of standard input closes, this process ends, which reads nothing
    meanwhile.

    By the system, since what is at work may let no other thread run: SIGIO comes when more is sent, which nobody does
    before there is an answer, or when nobody is there any more (fcntl(2), O_ASYNC). A parent-death signal would come
    at the end of the parent's thread that started this.
    """
    flags = fcntl.fcntl(0, fcntl.F_GETFL)
    with suppress(OSError):
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, flags | os.O_ASYNC)
    now = select.poll()
    now.register(0, 0)
    if now.poll(0):  # before it was told
        os._exit(1)
    try:
        yield
    finally:
        with suppress(OSError):
            fcntl.fcntl(0, fcntl.F_SETFL, flags)


def main() -> None:
    """Answer requests until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends this process
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", buffering=0)
    worker = Worker()
    worker.answer({"compile": "{{ messages | trim }}"})  # imports what compiling needs
    worker.answer({"render": {}, "each": [{"messages": ""}]})
    limit_memory(MEMORY)
    try:
        _serve(worker, requests, answers)
    except MemoryError:
        os._exit(NO_MEMORY)


def _serve(worker: Worker, requests: IO[bytes], answers: IO[bytes]) -> None:
    while (request := receive(requests)) is not None:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        with tied():
            answer = worker.answer(request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        data = memoryview(frame(answer))
        while data:
            data = data[answers.write(data) :]


if __name__ == "__main__":
    main()
