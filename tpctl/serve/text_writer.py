"""What /v1/completions says of answers: texts, which may begin with their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpctl.client.echoed import Echo, PromptLogprobs, places
from tpctl.client.openai_answers import text_logprobs
from tpctl.client.text_stream import TextStream
from tpctl.serve.answered import encode
from tpctl.serve.generation import Piece
from tpctl.serve.json_pieces import encode_pieces
from tpctl.serve.pool import Job
from tpctl.serve.writers import ChunkWriter


class TextWriter(ChunkWriter):
    """/v1/completions; with ``echo`` each answer begins with its prompt."""

    chat = False
    before, behind = b'"text":', b""

    def __init__(self, echo: Sequence[str] | None, told: PromptLogprobs, scored: bool, *rest: Any) -> None:
        """``echo``: the text of each prompt; ``scored``: answers are empty, whatever the engine makes."""
        self._echo = echo
        self._scored = scored  # as the usage has it, which is told while the rest is set
        super().__init__(*rest)
        self._told, self._echoed = told
        self._silent = self._tokenizer.special_ids  # which an answer's text leaves out
        before = [0] * len(self._jobs) if echo is None else list(map(len, echo))
        self._places = [before[at // self._each] for at in range(len(self._streams))]  # characters so far
        self._begun: set[int] = set()  # answers whose prompt has been told, with its log-probabilities
        self._early: list[Piece] = []  # of answers whose prompt's are not all there

    def begin(self) -> bytes:
        if self._echo is None or self._echoed is not None:
            return b""
        texts = [b'"text":' + encode(text) + self._tail for text in self._echo]
        return b"".join(head + texts[at // self._each] for at, head in enumerate(self._heads))

    def slow(self, pieces: Sequence[Piece]) -> bool:
        """A prompt's log-probabilities are as many as its tokens, whatever is new of its answer."""
        if self._echoed is not None and any(piece.at not in self._begun for piece in pieces):
            return True
        return super().slow(pieces)

    def pieces(self, pieces: Sequence[Piece]) -> bytes:
        if self._echoed is not None:  # an answer's first token may come before that of the one that has them
            pieces = [*self._early, *pieces]
            # Asked once for each prompt: a thread may do this while the event loop takes in what comes.
            known = {prompt: self._known(prompt) for prompt in {one.at // self._each for one in pieces}}
            self._early = [one for one in pieces if not known[one.at // self._each]]
            pieces = [one for one in pieces if known[one.at // self._each]]
        if self._scored:
            pieces = [one._replace(segments=[], tokens=0, finish_reason=_cut(one.finish_reason)) for one in pieces]
        return super().pieces(pieces)

    def _known(self, prompt: int) -> bool:
        """Whether the log-probabilities of a prompt are there: the first answer's token comes behind them."""
        return bool(self._jobs[prompt].streams[0].token_ids)

    def usage(self) -> dict[str, Any]:
        found = super().usage()
        if self._scored:
            found |= {"completion_tokens": 0, "total_tokens": found["prompt_tokens"]}
        return found

    def _full(self, piece: Piece) -> list[bytes]:
        """A prompt's log-probabilities are there when its answer's first token is."""
        begun = []
        if self._echo is not None and self._echoed is not None and piece.at not in self._begun:
            self._begun.add(piece.at)
            job = self._jobs[piece.at // self._each]
            said = self._echo[piece.at // self._each]
            rows = self._prompt(job, self._echoed)
            told = encode_pieces(text_logprobs(rows, places(rows, 0, self._silent, said)[:-1]), within=0)
            text = b'"text":' + encode(said)
            more = b',"logprobs":' + told + b',"finish_reason":null}'
            begun.append(self._heads[piece.at] + text + more + self._closed())
        return begun + super()._full(piece)

    def _deltas(self, piece: Piece) -> list[bytes]:
        return [self.before + encode(text) for text, *_ in piece.segments]

    def _last(self) -> bytes:
        return b'"text":""'

    def _logprobs(self, tokens: Sequence[dict[str, Any]], piece: Piece) -> dict[str, Any]:
        offsets = places(tokens, self._places[piece.at], self._silent)
        self._places[piece.at] = offsets.pop()
        return text_logprobs(tokens, offsets)

    def _choice(self, at: int, stream: TextStream, job: Job) -> dict[str, Any]:
        found = super()._choice(at, stream, job)
        prompt = at // self._each
        text = None if self._echo is None else self._echo[prompt]
        rows = None if self._echoed is None else self._prompt(job, self._echoed)
        echo = Echo(text, PromptLogprobs(self._told, self._echoed), self._scored)
        return echo.choice(found, rows, self._silent)


def _cut(finish_reason: str | None) -> str | None:
    """Why an answer that is told as empty ended, if it has."""
    return None if finish_reason is None else "length"
