"""What /v1/chat/completions and /v1/completions say of answers, whole and in chunks; the former's writer."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from tpctl.client.openai_answers import chat_logprobs, completion
from tpctl.client.openai_answers import usage as usage_of
from tpctl.client.reasoning_stream import Segment
from tpctl.client.text_stream import TextStream
from tpctl.client.token_text import TokenTexts, logprob_rows, prompt_rows, token_texts
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tools.calls import CallPiece
from tpctl.serve.answered import encode
from tpctl.serve.asked import Streaming
from tpctl.serve.errors import ApiError
from tpctl.serve.generation import Generation, Piece
from tpctl.serve.json_pieces import encode_pieces
from tpctl.serve.pool import Job

DONE = b"data: [DONE]\n\n"

MANY = 2048
"""Log-probabilities, of tokens and the likeliest beside them, which a thread tells if more come together: 3 us each."""


MANY_TOKENS = 64
"""Of a chunk, whose log-probabilities are encoded piece by piece."""


class ChunkWriter(ABC):
    """What both endpoints have in common.

    A chunk is put together of bytes that are made beforehand and the text: it is made for every token.

    Attributes:
        chat: which of the two it is. before, behind: what stands beside a text of the answer itself in a chunk.
    """

    chat: bool
    before: bytes
    behind: bytes

    def __init__(
        self, model: str, jobs: Sequence[Job], generation: Generation, tokenizer: Tokenizer, streaming: Streaming
    ) -> None:
        self._id = secrets.token_hex(12)
        self._created = int(time.time())
        self._model = model
        self._jobs = jobs
        self._prompt_tokens = sum(len(job.token_ids) for job in jobs)
        self._each = len(generation.streams) // len(jobs)  # answers of a prompt
        self._generation = generation
        self._streams = generation.streams
        self._tokenizer = tokenizer
        self._streaming = streaming
        self._wants_logprobs = jobs[0].sampling[0].logprobs is not None
        self._told = jobs[0].sampling[0].prompt_logprobs  # likeliest tokens beside each of the prompt's
        self._texts: dict[int, TokenTexts] = {}
        kind, name = ("chatcmpl", "chat.completion.chunk") if self.chat else ("cmpl", "text_completion")
        self.id = f"{kind}-{self._id}"
        opened = {"id": self.id, "object": name, "created": self._created, "model": model}
        self._head = b"data: " + encode(opened)[:-1] + b',"choices":['
        self._heads = [self._head + b'{"index":%d,' % at for at in range(len(self._streams))]
        self._tail = b',"logprobs":null,"finish_reason":null}' + self._closed()
        self._befores = [head + self.before for head in self._heads]
        self._behind = self.behind + self._tail
        self._plain = not (self._wants_logprobs or streaming.continuous_usage)

    def begin(self) -> bytes:
        return b""

    def slow(self, pieces: Sequence[Piece]) -> bool:
        return self._wants_logprobs and many_logprobs(self._jobs[0], pieces)

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        found: list[bytes] = []
        for piece in pieces:
            at, segments, _, _, reason = piece
            if not self._plain:
                found += self._full(piece)
            elif len(segments) == 1 and not (segments[0].reasoning or segments[0].call):
                found += (self._befores[at], encode(segments[0].text), self._behind)
            else:
                found += [self._heads[at] + delta + self._tail for delta in self._deltas(piece)]
            if reason is not None:
                said = b',"logprobs":null,"finish_reason":"%s"}' % reason.encode()
                found.append(self._heads[piece.at] + self._last() + said + self._closed())
        return b"".join(found)

    def text(self, text: str) -> bytes:
        if self._plain:
            return b"".join((self._befores[0], encode(text), self._behind))
        return self.pieces([Piece(0, [Segment(text)], 0, 0, None)])

    def end(self) -> bytes:
        if not self._streaming.usage:
            return DONE
        return self._head + b'],"usage":' + encode(self.usage()) + b"}\n\n" + DONE

    def broken(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n"

    def whole(self) -> dict[str, Any]:
        each = [(stream, job) for job in self._jobs for stream in job.streams]
        choices = [self._choice(at, stream, job) for at, (stream, job) in enumerate(each)]
        return completion(self._id, self._created, self._model, choices, self.usage(), chat=self.chat)

    def usage(self) -> dict[str, Any]:
        """The tokens of each prompt count once, however many answers it has."""
        generation = self._generation
        found = usage_of(self._prompt_tokens, generation.num_tokens)
        found["prompt_tokens_details"] = {"cached_tokens": generation.cached_tokens}
        if self.chat:
            found["completion_tokens_details"] = {"reasoning_tokens": generation.reasoning_tokens}
        return found

    @abstractmethod
    def _deltas(self, piece: Piece) -> list[bytes]:
        """The new texts of an answer, each as the field of a chunk."""

    @abstractmethod
    def _last(self) -> bytes:
        """That field where there is no text."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[dict[str, Any]], piece: Piece) -> dict[str, Any]:
        """What a chunk says of its tokens."""

    def _choice(self, at: int, stream: TextStream, job: Job) -> dict[str, Any]:
        reasoning = {} if stream.reasoning is None or not self.chat else {"reasoning": stream.reasoning}
        found: dict[str, Any] = {"text": stream.text, **reasoning, "finish_reason": stream.finish_reason}
        if calls := stream.calls:
            found["tool_calls"] = [call.to_dict() for call in calls]
        if self._wants_logprobs:
            found["logprobs"] = self._described(at, 0, len(stream.token_ids))
        if self._told is not None and job.streams[0].prompt_logprobs is not None:
            found["prompt_logprobs"] = self._prompt(job, self._told)
        return found

    def _prompt(self, job: Job, most: int) -> list[dict[str, Any]]:
        """The prompt's tokens, each with so many likeliest ones at most: of all its answers the first one has them."""
        rows = prompt_rows(self._tokenizer, job.token_ids, job.streams[0].prompt_logprobs or ())
        return [{**row, "top": row["top"][:most]} for row in rows]

    def _full(self, piece: Piece) -> list[bytes]:
        """Chunks with log-probabilities of their tokens or the usage so far."""
        logprobs = b"null"
        if self._wants_logprobs and piece.tokens:
            told = self._logprobs(self._described(piece.at, piece.first, piece.tokens), piece)
            logprobs = encode(told) if piece.tokens <= MANY_TOKENS else encode_pieces(told, within=0)
        deltas = self._deltas(piece) or ([self._last()] if logprobs != b"null" else [])
        found = []
        for delta in deltas:
            said = b',"logprobs":' + logprobs + b',"finish_reason":null}'
            found.append(self._heads[piece.at] + delta + said + self._closed())
            logprobs = b"null"
        return found

    def _described(self, at: int, first: int, count: int) -> list[dict[str, Any]]:
        stream = self._streams[at]
        if (texts := self._texts.get(at)) is None:
            texts = self._texts[at] = token_texts(self._tokenizer, self._jobs[at // self._each].token_ids)
        which = slice(first, first + count)
        return logprob_rows(texts, stream.token_ids[which], stream.logprobs[which])

    def _closed(self) -> bytes:
        if self._streaming.continuous_usage:
            return b'],"usage":' + encode(self.usage()) + b"}\n\n"
        return b'],"usage":null}\n\n' if self._streaming.usage else b"]}\n\n"


class ChatWriter(ChunkWriter):
    """/v1/chat/completions."""

    chat = True
    before, behind = b'"delta":{"content":', b"}"

    def begin(self) -> bytes:
        role = b'"delta":{"role":"assistant","content":""}'
        return b"".join(head + role + self._tail for head in self._heads)

    def _deltas(self, piece: Piece) -> list[bytes]:
        return [
            (b'"delta":{"reasoning_content":' if reasoning else self.before) + encode(text) + self.behind
            if call is None
            else b'"delta":{"tool_calls":[' + encode(_call(call)) + b"]}"
            for text, reasoning, call in piece.segments
            if call is None or not (call.taken_back or call.cut)
        ]

    def _last(self) -> bytes:
        return b'"delta":{}'

    def _logprobs(self, tokens: Sequence[dict[str, Any]], piece: Piece) -> dict[str, Any]:
        return chat_logprobs(tokens)


def many_logprobs(job: Job, pieces: Sequence[Piece]) -> bool:
    """Whether to tell the log-probabilities of an answer's pieces, if they are wanted, takes milliseconds."""
    likeliest = job.sampling[0].logprobs
    return likeliest is not None and (1 + likeliest) * sum(piece.tokens for piece in pieces) > MANY


def _call(piece: CallPiece) -> dict[str, Any]:
    """The next piece of a call: its id and name first, then characters of its arguments."""
    if piece.id is None:
        return {"index": piece.at, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.at, "id": piece.id, "type": "function", "function": function}
