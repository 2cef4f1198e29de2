"""What /v1/responses answers, whole and as events. Nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tpctl.client.openai_answers import response_logprobs
from tpctl.client.reasoning_stream import Segment
from tpctl.client.token_text import TokenTexts, logprob_rows, token_texts
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tools.calls import CallPiece
from tpctl.client.turns import Part
from tpctl.serve.answered import encode
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Generation, Piece
from tpctl.serve.json_pieces import encode_pieces
from tpctl.serve.pool import Job
from tpctl.serve.response_asked import ResponseAsked
from tpctl.serve.writers import many_logprobs

SLOW = 1 << 18
"""Bytes, about, of what a thread tells whole, since that takes milliseconds."""

_TOKEN = 1 << 10  # bytes, about, of a token's log-probabilities


@dataclass
class _Open:
    """An item that is being told, with the ``logprobs`` of its tokens; ``kind`` is "reasoning", "message" or
    "function_call"."""

    kind: str
    id: str
    text: str = ""
    call_id: str = ""
    name: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def item(self, status: str = "completed") -> dict[str, Any]:
        """It with the text that there is."""
        found: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == "function_call":
            return {**found, "call_id": self.call_id, "name": self.name, "arguments": self.text}
        found["content"] = [self.part(self.text, self.logprobs)]
        return {**found, **({"summary": []} if self.kind == "reasoning" else {"role": "assistant"})}

    def part(self, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The one part of a text."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


class ResponseWriter:
    """An answer's items, what was thought, a message and calls, each opened when its first text comes."""

    def __init__(
        self, model: str, asked: ResponseAsked, job: Job, generation: Generation, tokenizer: Tokenizer
    ) -> None:
        self._id = secrets.token_hex(24)
        self.id = f"resp_{self._id}"
        self._created = int(time.time())
        self._model = model
        self._repeated = asked.said
        self._job = job
        self._generation = generation
        self._stream = generation.streams[0]
        self._tokenizer = tokenizer
        self._texts: TokenTexts | None = None  # made for the first log-probability that is told
        self._described = self._said = 0  # tokens of all, and of the text's, whose log-probabilities have been told
        self._until = 0  # tokens that are being told; others may have come meanwhile
        self._length = asked.size  # bytes, about, of what the body said and of the items so far
        self._number = 0
        self._open: _Open | None = None
        self._told: list[dict[str, Any]] = []  # items, as far as they were told

    def begin(self) -> bytes:
        response = self._response("in_progress", [])
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def slow(self, pieces: Sequence[Piece]) -> bool:
        """What closes an item tells all of it again, several times; so does the end, of all items, and of what the body
        said, as the beginning does."""
        if many_logprobs(self._job, pieces):
            return True
        if self._length < SLOW:
            return False
        return not pieces or any(self._closes(segment) for piece in pieces for segment in piece.segments)

    def _closes(self, segment: Segment) -> bool:
        kind = "function_call" if segment.call else "reasoning" if segment.reasoning else "message"
        opens = segment.call is not None and segment.call.id is not None
        return self._open is not None and (opens or self._open.kind != kind)

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        found = []
        for piece in pieces:
            self._until = piece.first + piece.tokens
            for text, reasoning, call in piece.segments:
                found.append(
                    self._say("reasoning" if reasoning else "message", text) if call is None else self._call(call)
                )
        return b"".join(found)

    def text(self, text: str) -> bytes:
        return self._say("message", text)

    def end(self) -> bytes:
        cut = self._stream.finish_reason == "length"
        if self._open is None or self._open.kind == "reasoning":
            found = self._close()
            if all(item["type"] == "reasoning" for item in self._told):
                found += self._begin(self._new("message"))
        else:
            found = b""
        found += self._close("incomplete" if cut and self._open and self._open.kind == "message" else "completed")
        response = self.whole()
        return found + self._event(f"response.{response['status']}", response=response)

    def broken(self, error: ApiError) -> bytes:
        said = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response={**self._response("failed", []), "error": said})

    def whole(self) -> dict[str, Any]:
        cut = self._stream.finish_reason == "length"
        if not self._told:
            self._tell(cut)
        found = self._response("incomplete" if cut else "completed", self._told)
        cached, thought = self._stream.num_cached_tokens, self._generation.reasoning_tokens
        tokens_in, out = len(self._job.token_ids), len(self._stream.token_ids)
        found["usage"] = {
            "input_tokens": tokens_in,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": out,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": tokens_in + out,
        }
        return found

    def _tell(self, cut: bool) -> None:
        """The items of an answer that was not told as it grew."""
        parts = self._stream.parts
        if all(part.kind == "reasoning" for part in parts):
            parts = [*parts, Part("message", "", None)]
        for part in parts:
            status = "completed"
            if part.call is not None:
                number = sum(item["type"] == part.kind for item in self._told)
                item = _Open(part.kind, f"fc_{self._id}{number}", part.call.arguments, part.call.id, part.call.name)
                status = "completed" if part.call.whole else "incomplete"
            else:
                item = self._new(part.kind, self._alone(part.text))
                if part.kind == "message":
                    item.logprobs = self._logprobs(part.said, all=True)
                    status = "incomplete" if cut and part is parts[-1] else "completed"
            self._told.append(item.item(status))

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        said, sampling = self._repeated, self._job.sampling[0]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": said["instructions"],
            "max_output_tokens": said["max_output_tokens"],
            "metadata": said["metadata"] or {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": said["parallel_tool_calls"] is not False,
            "previous_response_id": None,
            "reasoning": {"effort": said["effort"], "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": said["format"] or {"type": "text"}},
            "tool_choice": said["tool_choice"] or "auto",
            "tools": said["tools"] or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _say(self, kind: str, text: str) -> bytes:
        found = b""
        if self._open is None or self._open.kind != kind:
            found = self._close()
            text = self._alone(text)
            found += self._begin(self._new(kind))
        assert self._open is not None
        self._open.text += text
        self._length += len(text)
        name, more = "reasoning_text", {}
        if kind == "message":
            name, more = "output_text", {"logprobs": (new := self._logprobs(self._ended()))}
            self._open.logprobs += new
            self._length += _TOKEN * len(new)
        return found + self._event(f"response.{name}.delta", **self._place(), delta=text, **more)

    def _alone(self, text: str) -> str:
        """A text without the blank line that a chat's has behind a call: here it is an item of its own."""
        behind = bool(self._told) and self._told[-1]["type"] == "function_call"
        return text.removeprefix("\n\n") if behind else text

    def _ended(self) -> int | None:
        """How many tokens texts had at the end of the one that is told, if that has been reached."""
        number = sum(item["type"] == "message" for item in self._told)
        ends = [turn.said for turn in self._stream.turns if turn.kind == "message"]
        return ends[number] if number < len(ends) else None

    def _logprobs(self, end: int | None, *, all: bool = False) -> list[dict[str, Any]]:
        """Of the text's tokens that were told since they were last asked for, ``all``: that have come; up to so many of
        all texts'."""
        stream, first = self._stream, self._described
        until = len(stream.token_ids) if all else self._until
        if not (places := [place for place in stream.said[self._said : end] if place < until]):
            return []
        self._said += len(places)
        self._described = places[-1] + 1
        new = slice(first, self._described)
        if self._texts is None:
            self._texts = token_texts(self._tokenizer, self._job.token_ids)
        rows = logprob_rows(self._texts, stream.token_ids[new], stream.logprobs[new])
        return response_logprobs([rows[place - first] for place in places])

    def _call(self, piece: CallPiece) -> bytes:
        if piece.taken_back or piece.cut:
            return self._close("incomplete")
        found = b""
        if piece.id is not None:
            id = f"fc_{self._id}{piece.at}"
            found = self._close() + self._begin(_Open("function_call", id, "", piece.id, piece.name or ""))
        if not piece.arguments or self._open is None:
            return found
        self._open.text += piece.arguments
        place = {"item_id": self._open.id, "output_index": len(self._told)}
        return found + self._event("response.function_call_arguments.delta", **place, delta=piece.arguments)

    def _new(self, kind: str, text: str = "") -> _Open:
        """A text's item. Behind calls there may be another message."""
        number = sum(item["type"] == kind for item in self._told)
        return _Open(kind, f"{'rs' if kind == 'reasoning' else 'msg'}_{self._id}{number or ''}", text)

    def _begin(self, item: _Open) -> bytes:
        """Open an item and the one part that a text has."""
        self._open = item
        told = item.item("in_progress")
        if item.kind == "function_call":
            return self._event("response.output_item.added", output_index=len(self._told), item=told)
        added = self._event("response.output_item.added", output_index=len(self._told), item={**told, "content": []})
        return added + self._event("response.content_part.added", **self._place(), part=item.part(""))

    def _close(self, status: str = "completed") -> bytes:
        item, place = self._open, len(self._told)
        if item is None:
            return b""
        if item.kind == "message":
            item.logprobs += self._logprobs(self._ended(), all=True)  # of tokens that came to no text, too
        told = item.item("completed" if item.kind == "reasoning" else status)
        if item.kind == "function_call":
            about = {"item_id": item.id, "output_index": place, "name": item.name, "arguments": item.text}
            found = self._event("response.function_call_arguments.done", **about)
        else:
            thought = item.kind == "reasoning"
            name, more = ("reasoning_text", {}) if thought else ("output_text", {"logprobs": item.logprobs})
            found = self._event(f"response.{name}.done", **self._place(), text=item.text, **more)
            part = item.part(item.text, item.logprobs)
            found += self._event("response.content_part.done", **self._place(), part=part)
        found += self._event("response.output_item.done", output_index=place, item=told)
        self._open = None
        self._told.append(told)
        return found

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": len(self._told), "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        said = {"type": kind, "sequence_number": number, **fields}
        data = encode(said) if self._length < SLOW else encode_pieces(said)
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
