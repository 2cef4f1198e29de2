"""Runs any number of jobs through one engine in constant memory: a bounded window of them at a time."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tpctl.client.echoed import likeliest
from tpctl.client.engine_client import EngineClient
from tpctl.client.jobs import BadLine, Job, JobId, JobParser, Line
from tpctl.client.router import Mailbox
from tpctl.client.text_stream import TextStream
from tpctl.client.token_text import logprob_rows, prompt_rows, token_texts
from tpctl.client.tokenizer import Tokenizer
from tpctl.errors import RequestError, TpctlError, printable
from tpctl.wire.guide import cannot_be_had
from tpctl.wire.messages import Output, Request

CHOICES_APART = 1 << 32
"""Between the seeds of a line's answers; those of lines are one apart."""

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


@dataclass
class _Answers:
    """The answers to one line as they come; ``notes`` of those that have one, ``left``: that have not ended."""

    job: Job
    streams: list[TextStream]
    notes: list[str | None]
    left: int

    @property
    def ids(self) -> list[str]:
        """Of their requests."""
        index = self.job.line.index
        return [str(index) if len(self.streams) == 1 else f"{index}.{at}" for at in range(len(self.streams))]


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
        self._open: dict[str, tuple[_Answers, int]] = {}  # by request: of which line, and which of its answers
        self.tally = Tally()

    @property
    def under_way(self) -> int:
        """Requests that the engine has."""
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
                        self.tally.given_up = sorted({found.job.line.number for found, _ in self._open.values()})
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
                self._fail(item.line, item.id, item.message, item.beside)
            else:
                self.tally.prompt_tokens += len(item.token_ids)
                requests += self._begin(item)
        mailbox.submit(requests)
        return more

    def _begin(self, job: Job) -> list[Request]:
        form = self._tokenizer.reasoning if job.chat else None
        streams = [
            TextStream(self._tokenizer, job.stop, job.token_ids, job.sampling.min_tokens, form, job.tools)
            for _ in range(job.choices)
        ]
        answers = _Answers(job, streams, [None] * len(streams), len(streams))
        requests = []
        for at, id in enumerate(answers.ids):
            self._open[id] = (answers, at)
            sampling = job.sampling
            if at:  # the prompt's log-probabilities are the same for all
                seed = (sampling.seed + at * CHOICES_APART) % 2**63
                sampling = replace(sampling, seed=seed, prompt_logprobs=None)
            requests.append(Request(id, job.token_ids, sampling))
        return requests

    def _take(self, outputs: list[Output]) -> list[str]:
        """Take in what came; ids of requests that have ended and of which the engine does not know that."""
        stopped: list[str] = []
        for output in outputs:
            if output.id not in self._open:
                continue  # the last words of one that a stop string ended
            answers, at = self._open[output.id]
            stream = answers.streams[at]
            before = len(stream.token_ids)
            try:
                stream.push(output)
            except TpctlError as error:  # the tokenizer cannot decode this answer; others go on
                stopped += [output.id, *self._give_up(answers, str(error))]
                continue
            if answers.job.echo is None or not answers.job.echo.scored:  # else they are not told
                self.tally.completion_tokens += len(stream.token_ids) - before
            if stream.finish_reason is None:
                continue
            if stream.finish_reason == "error":
                others = self._give_up(answers, str(output.message))
                stopped += [id for id in others if id != output.id]
                continue
            del self._open[output.id]
            if stream.stopped_early and output.finish_reason is None:
                stopped.append(output.id)
            if stream.finish_reason == "length":
                answers.notes[at] = output.message
            answers.left -= 1
            if not answers.left:
                self._finish(answers)
        return stopped

    def _give_up(self, answers: _Answers, message: str) -> list[str]:
        """Make an error row of a line; ids of its requests that were under way."""
        under_way = [id for id in answers.ids if self._open.pop(id, None) is not None]
        job = answers.job
        beside = {**job.beside, **job.refused} if cannot_be_had(message, job.sampling.guide) else job.beside
        self._fail(job.line, job.id, f"{job.line.named}: {message}", beside)
        return under_way

    def _finish(self, answers: _Answers) -> None:
        """Keep the row of a line whose answers have all ended."""
        job, streams = answers.job, answers.streams
        choices = [self._choice(job, stream, note) for stream, note in zip(streams, answers.notes, strict=True)]
        prompt = None  # which is the same for all of them
        if streams[0].prompt_logprobs is not None:
            prompt = prompt_rows(self._tokenizer, job.token_ids, streams[0].prompt_logprobs)
        if job.echo is not None:
            choices = [job.echo.choice(choice, prompt, self._tokenizer.special_ids) for choice in choices]
            most = job.echo.told.asked
            prompt = None if prompt is None or most is None else likeliest(prompt, most)
        note = next((note for note in answers.notes if note is not None), None)
        row: dict[str, Any] = {"id": job.id}
        if len(choices) == 1:
            row |= {name: value for name, value in choices[0].items() if name not in ("logprobs", "note")}
        else:
            row["choices"] = choices
        row["prompt_tokens"] = len(job.token_ids)
        row["completion_tokens"] = sum(len(stream.token_ids) for stream in streams)
        if job.echo is not None and job.echo.scored:
            row["completion_tokens"] = 0
        if len(choices) == 1 and "logprobs" in choices[0]:
            row["logprobs"] = choices[0]["logprobs"]
        if prompt is not None:
            row["prompt_logprobs"] = prompt
        if note is not None:
            row["note"] = note
            self.tally.cut += 1
        cached = streams[0].num_cached_tokens  # the prompt is counted once
        try:
            self._results.add(job.line, {**row, **job.beside}, cached)
        except RequestError as error:
            self._fail(job.line, job.id, f"{job.line.named}: {error}", job.beside)
            return
        self.tally.lines += 1
        self.tally.cached_tokens += cached

    def _choice(self, job: Job, stream: TextStream, note: str | None) -> dict[str, Any]:
        return {
            "text": stream.text,
            **({} if stream.reasoning is None else {"reasoning": stream.reasoning}),
            **({"tool_calls": [call.to_dict() for call in stream.calls]} if stream.calls else {}),
            "finish_reason": stream.finish_reason,
            **({} if job.sampling.logprobs is None else {"logprobs": self._logprobs(job, stream)}),
            **({} if note is None else {"note": note}),
        }

    def _logprobs(self, job: Job, stream: TextStream) -> list[dict[str, Any]]:
        return logprob_rows(token_texts(self._tokenizer, job.token_ids), stream.token_ids, stream.logprobs)

    def _fail(self, line: Line, id: JobId, message: str, beside: Mapping[str, Any]) -> None:
        self.tally.lines += 1
        self.tally.errors += 1
        self._results.add(line, {"id": id, "error": printable(message), **beside})


def in_groups(lines: Iterable[Line], together: int) -> Iterator[list[Line]]:
    """Lines, so many at a time."""
    rest = iter(lines)
    while group := list(itertools.islice(rest, together)):
        yield group
