"""Runs any number of jobs through one engine in constant memory: a bounded window of them at a time."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tpctl.client.engine_client import EngineClient
from tpctl.client.jobs import BadLine, Job, JobParser, Line
from tpctl.client.router import Mailbox
from tpctl.client.text_stream import TextStream
from tpctl.client.token_text import token_texts
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import RequestError, TpctlError, printable
from tpctl.wire.messages import Output, Request

_POLL = 0.1  # seconds between looks at interruptions and at new lines


@dataclass
class Tally:
    """What a run has done so far. Times are in seconds, tokens are those of this run alone.

    ``lines`` counts the input's lines with text that were dealt with; ``resumed`` of them were answered by an
    earlier run, ``errors`` became error rows, and ``cut`` answers ended with the context. ``given_up``: numbers of the
    lines that were under way when the run was interrupted.
    """

    lines: int = 0
    resumed: int = 0
    errors: int = 0
    cut: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    started: float = 0.0
    interrupted: bool = False
    given_up: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / max(self.seconds, 1e-9)


class Kept(Protocol):
    """Where finished rows go."""

    def has(self, line: Line) -> bool:
        """Whether an earlier run answered this very line."""

    def add(self, line: Line, row: Mapping[str, Any], cached: int = 0) -> None:
        """Keep a row; so many tokens of its prompt were ``cached``. Raises ``RequestError`` if there is no JSON for it,
        ``OutputError`` if it cannot be written."""


class _Feed:
    """A thread that parses and tokenizes lines ahead, so that a slow input does not hold up answers.

    The lines of a group are parsed together.
    """

    def __init__(self, groups: Iterable[Sequence[Line]], parser: JobParser, results: Kept, ahead: int) -> None:
        self._queue: queue.Queue[Job | BadLine | Line | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        threading.Thread(target=self._run, args=(groups, parser, results), daemon=True).start()

    def take(self, wait: bool) -> Job | BadLine | Line | None:
        """What comes next: a ``Line`` if it was answered before, ``None`` at the end.

        Raises:
            queue.Empty: nothing is ready (within ``_POLL`` seconds, if ``wait``).
        """
        item = self._queue.get(block=wait, timeout=_POLL if wait else None)
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        self._stop.set()

    def _run(self, groups: Iterable[Sequence[Line]], parser: JobParser, results: Kept) -> None:
        try:
            for group in groups:
                parser.ahead(group)
                for line in group:
                    parsed = parser.parse(line)
                    self._put(line if isinstance(parsed, Job) and results.has(line) else parsed)
                    if self._stop.is_set():
                        return
            self._put(None)
        except BaseException as error:  # whatever it is, the thread that waits must hear of it
            self._put(error)

    def _put(self, item: Job | BadLine | Line | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=_POLL)
            except queue.Full:
                continue
        return None


class Batch:
    """One run: lines in, rows out.

    Attributes:
        tally: how far it is.
    """

    def __init__(self, client: EngineClient, tokenizer: Tokenizer, results: Kept, window: int) -> None:
        """Prepare.

        Args:
            window: jobs that the engine holds at most, waiting ones included.
        """
        self._client = client
        self._tokenizer = tokenizer
        self._results = results
        self._window = window
        self._open: dict[str, tuple[Job, TextStream]] = {}
        self.tally = Tally()

    @property
    def under_way(self) -> int:
        """Jobs that the engine has."""
        return len(self._open)

    def run(
        self,
        lines: Iterable[Line],
        parser: JobParser,
        *,
        together: int = 1,
        step: Callable[[Tally], object] = lambda tally: None,
        should_stop: Callable[[], object] = lambda: False,
    ) -> Tally:
        """Answer every line.

        Args:
            together: lines that are read before any of them is answered, which saves time where all are there.
            step: called after every few answers and whenever nothing happened for a moment.
            should_stop: asked often; once true, what is under way is given up and the run ends.

        Raises:
            OutputError: a row cannot be kept.
            EngineError: the workers failed. Rows that finished are kept in both cases.
        """
        return self.run_groups(in_groups(lines, together), parser, step=step, should_stop=should_stop)

    def run_groups(
        self,
        groups: Iterable[Sequence[Line]],
        parser: JobParser,
        *,
        step: Callable[[Tally], object],
        should_stop: Callable[[], object],
    ) -> Tally:
        """As ``run``, of lines that come in groups; those of one are parsed together."""
        self.tally = Tally(started=time.monotonic())
        self._open = {}
        feed = _Feed(groups, parser, self._results, self._window)
        more = True
        try:
            with self._client.mailbox() as mailbox:  # which aborts what is under way at its end
                while more or self._open:
                    if should_stop():
                        self.tally.interrupted = True
                        self.tally.given_up = sorted(job.line.number for job, _ in self._open.values())
                        break
                    more = more and self._fill(feed, mailbox)
                    if self._open:
                        mailbox.abort(self._take(mailbox.outputs(timeout=_POLL)))
                    step(self.tally)
        finally:
            feed.stop()
        return self.tally

    def _fill(self, feed: _Feed, mailbox: Mailbox) -> bool:
        """Hand in jobs until the window is full or none is ready; whether more may come."""
        requests: list[Request] = []
        more = True
        while len(self._open) < self._window:
            try:
                item = feed.take(wait=not self._open)
            except queue.Empty:
                break
            if item is None:
                more = False
                break
            if isinstance(item, Line):
                self.tally.lines += 1
                self.tally.resumed += 1
            elif isinstance(item, BadLine):
                self._fail(item.line, item.id, item.message)
            else:
                self.tally.prompt_tokens += len(item.token_ids)
                form = self._tokenizer.reasoning if item.chat else None
                stream = TextStream(self._tokenizer, item.stop, item.token_ids, item.sampling.min_tokens, form)
                self._open[str(item.line.index)] = (item, stream)
                requests.append(Request(str(item.line.index), item.token_ids, item.sampling))
        mailbox.submit(requests)
        return more

    def _take(self, outputs: list[Output]) -> list[str]:
        """Take in what came; ids of requests that have ended and of which the engine does not know that."""
        stopped = []
        for output in outputs:
            if output.id not in self._open:
                continue  # the last words of one that a stop string ended
            job, stream = self._open[output.id]
            before = len(stream.token_ids)
            try:
                stream.push(output)
            except TpctlError as error:  # the tokenizer cannot decode this answer; others go on
                del self._open[output.id]
                self._fail(job.line, job.id, f"line {job.line.number}: {error}")
                stopped.append(output.id)
                continue
            self.tally.completion_tokens += len(stream.token_ids) - before
            if stream.finish_reason is None:
                continue
            del self._open[output.id]
            if stream.finish_reason == "error":
                self._fail(job.line, job.id, f"line {job.line.number}: {output.message}")
                continue
            if stream.stopped_early and output.finish_reason is None:
                stopped.append(output.id)
            row = self._row(job, stream)
            if stream.finish_reason == "length" and output.message is not None:
                row["note"] = output.message
                self.tally.cut += 1
            try:
                self._results.add(job.line, row, stream.num_cached_tokens)
            except RequestError as error:
                self._fail(job.line, job.id, f"line {job.line.number}: {error}")
                continue
            self.tally.lines += 1
            self.tally.cached_tokens += stream.num_cached_tokens
        return stopped

    def _row(self, job: Job, stream: TextStream) -> dict[str, Any]:
        row: dict[str, Any] = {
            "id": job.id,
            "text": stream.text,
            **({} if stream.reasoning is None else {"reasoning": stream.reasoning}),
            "finish_reason": stream.finish_reason,
            "prompt_tokens": len(job.token_ids),
            "completion_tokens": len(stream.token_ids),
        }
        if job.sampling.logprobs is not None:
            row["logprobs"] = self._logprobs(job, stream)
        return row

    def _logprobs(self, job: Job, stream: TextStream) -> list[dict[str, Any]]:
        texts = token_texts(self._tokenizer, job.token_ids)
        found = []
        for id, at in zip(stream.token_ids, stream.logprobs, strict=False):
            others = [{"id": other, "token": texts.peek(other), "logprob": value} for other, value in at.top]
            found.append({"id": id, "token": texts.push(id), "logprob": at.logprob, "top": others})
        return found

    def _fail(self, line: Line, id: str | int, message: str) -> None:
        self.tally.lines += 1
        self.tally.errors += 1
        self._results.add(line, {"id": id, "error": printable(message)})


def in_groups(lines: Iterable[Line], together: int) -> Iterator[list[Line]]:
    """Lines, so many at a time."""
    rest = iter(lines)
    while group := list(itertools.islice(rest, together)):
        yield group
