"""The lines of a batch file as requests, and what is wrong with those that are none.

{"prompt": "Once upon"}
{"prompt": [504, 2612, 16]}
{"id": "q7", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 20, "stop": ["\\n"]}
{"messages": [{"role": "user", "content": "Why?"}], "chat_template_kwargs": {"enable_thinking": false}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import count
from typing import IO, Any
from zlib import crc32

from tpctl.client.chat_messages import check_messages
from tpctl.client.echoed import Echo, PromptLogprobs
from tpctl.client.fields import FieldError, asked_as
from tpctl.client.forms import FIELDS, OWN, SAMPLING_FIELDS, Form, Wanted, read_stop, read_variables
from tpctl.client.guides import called
from tpctl.client.router import check_length
from tpctl.client.token_ids import begins_with_id, check_ids
from tpctl.client.tokenizer import Tokenizer, check_text
from tpctl.client.tool_grammar import formed
from tpctl.client.tool_stream import check_tools
from tpctl.client.tools.asked import Tools, with_tools
from tpctl.errors import SourceError, TpctlError, shorten, shown
from tpctl.json_file import TwoMeanings, one_meaning
from tpctl.wire.guide import NAMES as GUIDES
from tpctl.wire.sampling import SamplingParams

LONGEST_LINE = 16 << 20
"""Bytes; the texts of the longest contexts that models have take a third of it."""

JobId = str | int | None
"""``None``: of a line that should have one, and has none."""


@dataclass(frozen=True)
class Line:
    """A line with text. ``index`` counts such lines from 0, ``number`` all lines from 1; ``unit`` is what messages call
    it."""

    index: int
    number: int
    raw: bytes
    unit: str = "line"

    @property
    def named(self) -> str:
        """As messages call it."""
        return f"{self.unit} {self.number}"

    @property
    def checksum(self) -> int:
        """Tells an edited line from the one that was answered before; 32 bits."""
        return crc32(self.raw.strip())


@dataclass(frozen=True)
class Job:
    """A line that can be run; ``chat`` if it has messages, and no prompt.

    Attributes:
        choices: answers that it asks for.
        tools: functions that they may call.
        echo: how they are told, where that is not as they are.
        beside: what its row has besides them; ``refused``: what more, if it cannot be had as it is.
    """

    line: Line
    id: JobId
    token_ids: list[int]
    sampling: SamplingParams
    stop: tuple[str, ...]
    chat: bool = False
    choices: int = 1
    tools: Tools | None = None
    echo: Echo | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadLine:
    """A line that cannot; ``message`` names it by its number. ``beside`` as of ``Job``."""

    line: Line
    id: JobId
    message: str
    beside: Mapping[str, Any] = field(default_factory=dict)


def bounded_lines(stream: IO[bytes], name: str) -> Iterator[bytes]:
    """The lines of a file, their ends included; what has none, as a device that never ends, must not fill the memory.

    Raises:
        SourceError: a line of ``name`` is longer than ``LONGEST_LINE``.
    """
    for number in count(1):
        line = stream.readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise SourceError(
                f"line {number} of {name} is longer than {LONGEST_LINE >> 20} MiB; a batch file has one request a line"
            )
        if not line:
            return
        yield line


class JobParser:
    """Turns lines into jobs.

    Remembers a digest of the ids it has seen, about 100 bytes each, to find duplicates, unless others do.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        sampling: Mapping[str, Any],
        stop: Sequence[str],
        max_model_len: int,
        vocab_size: int = 0,
        repeated: Callable[[Line], bool] | None = None,
        form: Callable[[], Form] = lambda: OWN,
    ) -> None:
        """Set what lines may leave out.

        Args:
            sampling: fields of ``SamplingParams``. Line n without a seed of its own gets ``seed + n - 1``, so
                that equal prompts are sampled differently, and the same way on every run.
            stop: texts that end an answer.
            max_model_len: tokens of the longest sequence.
            vocab_size: tokens that the model knows; 0: it is not known.
            repeated: says whether an earlier line has a line's id, if somebody else remembers them.
            form: says how lines ask, once there are some.
        """
        self._tokenizer = tokenizer
        self._sampling = {"seed": 0, **sampling}
        self._stop = tuple(stop)
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._repeated = repeated
        self._form = form
        self._seen: set[bytes] = set()
        self._rendered: dict[int, str] = {}

    def ahead(self, lines: Sequence[Line]) -> None:
        """Render the conversations of lines that will be parsed next, together: faster than one by one."""
        found = {}
        for line in lines if len(lines) > 1 else ():
            try:
                wanted = self._form().wanted(_load(line.raw))
                entry = wanted.fields
                if entry.get("messages") and "prompt" not in entry and self._tokenizer.has_chat_template:
                    found[line.index] = (
                        check_messages(entry["messages"]),
                        with_tools(_variables(entry), wanted.tools),
                    )
            except (_Refused, TpctlError):
                continue  # ``parse`` says why
        if len(found) > 1:
            try:
                texts = self._tokenizer.template.render_all(list(found.values()))
            except TpctlError:
                return
            self._rendered = {i: text for i, text in zip(found, texts, strict=True) if text is not None}

    def parse(self, line: Line) -> Job | BadLine:
        """A job, or why the line is none."""
        form = self._form()
        id: JobId = None if form.id_needed else line.number
        beside: Mapping[str, Any] = {}
        asked: Mapping[str, Any] = {}
        why: Exception
        try:
            entry = _load(line.raw)
            beside = form.beside(entry)
            given = entry.get(form.id_field)
            if given is None and form.id_needed:
                raise _Refused(f"has no {form.id_field}, which ids are to come from")
            if given is not None:
                if isinstance(given, bool) or not isinstance(given, str | int):
                    raise _Refused(f"{form.id_field} is {shown(given)}, but must be a string or a whole number")
                if isinstance(given, str):
                    check_text(given, form.id_field)
                id = given
            self._check_new(line, id, form)
            wanted = form.wanted(entry)
            asked = wanted.fields
            with asked_as(wanted.names):
                return self._job(line, id, wanted, beside, form)
        except (_Refused, TpctlError) as error:
            message, why = _said(line, str(error)), error
        except Exception as error:  # one line must never end the run, whatever a library makes of it
            said = " ".join(f"{type(error).__name__}: {error}".split())
            message, why = f"{line.named}: cannot be used: {said}", error
        return BadLine(line, id, message, {**beside, **form.refused(why, chat="messages" in asked)})

    def _job(self, line: Line, id: JobId, wanted: Wanted, beside: Mapping[str, Any], form: Form) -> Job:
        entry = wanted.fields
        if unknown := sorted(entry.keys() - FIELDS):
            raise _Refused(f"unknown field {shorten(repr(unknown[0]))}; known: {', '.join(sorted(FIELDS))}")
        own = {name: value for name, value in entry.items() if name in SAMPLING_FIELDS}
        seed = (self._sampling["seed"] + line.number - 1) % 2**63
        if any(name in own for name in GUIDES):  # a line's own form takes the place of all lines'
            own = {**dict.fromkeys(GUIDES), **own}
        sampling = SamplingParams.from_dict({**self._sampling, "seed": seed, **own})
        stop = read_stop(entry["stop"]) if "stop" in entry else self._stop
        token_ids = self._tokenize(line, entry, wanted.tools)
        check_length(len(token_ids), self._max_model_len)
        if not isinstance(entry.get("prompt"), str | None):
            check_ids(token_ids, self._vocab_size, "prompt")
        thoughts = self._tokenizer.reasoning if "messages" in entry else None
        sampling = called(formed(sampling, self._tokenizer, token_ids, thoughts, wanted.tools), wanted.names)
        echo = None
        if wanted.echo or wanted.scored:
            text = entry["prompt"]
            if not isinstance(text, str):
                text = self._tokenizer.decode(token_ids, skip_special=False)
            told = PromptLogprobs(sampling.prompt_logprobs, sampling.logprobs if wanted.echo else None)
            echo = Echo(text if wanted.echo else None, told, wanted.scored)
            sampling = replace(sampling, prompt_logprobs=told.most)
        chat, tools, refused = "messages" in entry, wanted.tools, dict[str, Any]()
        if sampling.guide is not None:
            refused |= form.refused(FieldError("", sampling.guide.field), chat=chat)
        return Job(line, id, token_ids, sampling, stop, chat, wanted.choices, tools, echo, beside, refused)

    def _tokenize(self, line: Line, entry: Mapping[str, Any], tools: Tools | None) -> list[int]:
        if ("prompt" in entry) == ("messages" in entry):
            has = 'both "prompt" and' if "prompt" in entry else 'neither "prompt" nor'
            raise _Refused(f'has {has} "messages"; give one of them')
        if "messages" in entry:
            if tools is not None:
                check_tools(self._tokenizer)
            text = self._rendered.pop(line.index, None)
            if text is not None:
                return self._tokenizer.encode_rendered(text, most=self._max_model_len - 1)
            messages = check_messages(entry["messages"])
            variables = with_tools(_variables(entry), tools)
            return self._tokenizer.encode_chat(messages, variables, most=self._max_model_len - 1)
        if entry.get("chat_template_kwargs") is not None:
            raise _Refused('has chat_template_kwargs, which are for "messages", with a "prompt"; leave them out')
        prompt = entry["prompt"]
        if begins_with_id(prompt):
            return list(prompt)
        if not isinstance(prompt, str):
            raise _Refused(f"prompt is {shown(prompt)}, but must be a string, or a list of token ids")
        if not prompt:
            raise _Refused("the prompt is empty")
        return self._tokenizer.encode(prompt, most=self._max_model_len - 1)

    def _check_new(self, line: Line, id: JobId, form: Form) -> None:
        # Not hash(): it is the same for -1 and -2, and for n and n + 2**61 - 1.
        key = blake2b(repr((type(id).__name__, id)).encode(), digest_size=8).digest()
        if key in self._seen if self._repeated is None else self._repeated(line):
            otherwise = "" if form.id_needed else " (without one, the line number is taken)"
            raise _Refused(f"{form.id_field} {shorten(repr(id))} was used before; ids must differ{otherwise}")
        if self._repeated is None:
            self._seen.add(key)


def unanswered(form: Form, line: Line, message: str) -> dict[str, Any]:
    """The error row of a line that nobody could answer, whatever it holds."""
    found: dict[str, Any] = {"id": None if form.id_needed else line.number}
    beside: Mapping[str, Any] = {}
    with suppress(_Refused, TpctlError):
        entry = _load(line.raw)
        beside = form.beside(entry)
        given = entry.get(form.id_field)
        if isinstance(given, str | int) and not isinstance(given, bool):
            found["id"] = given
    return {**found, "error": f"{line.named}: {message}", **beside}


class _Refused(Exception):
    """A line that is no job; the text says why, for the error row."""


_OF_A_LINE = ("is ", "has ", "holds ")
"""What a message begins with that says something of the line itself, and not of what is in it."""


def _said(line: Line, message: str) -> str:
    return f"{line.named}{'' if message.startswith(_OF_A_LINE) else ':'} {message}"


def _load(raw: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(raw.decode("utf-8-sig").rstrip(), object_pairs_hook=one_meaning)
    except UnicodeDecodeError as error:
        raise _Refused(f"is not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise _Refused(f"is not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise _Refused("is nested too deeply to be read") from None
    except TwoMeanings as error:
        raise _Refused(f"is not valid: {error}") from None
    except ValueError:
        raise _Refused("holds a number of too many digits") from None
    if not isinstance(entry, dict):
        raise _Refused(f"is {shown(entry)}, but must be a JSON object")
    return entry


def _variables(entry: Mapping[str, Any]) -> dict[str, Any]:
    return read_variables(entry.get("chat_template_kwargs"))
