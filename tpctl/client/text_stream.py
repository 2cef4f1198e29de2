"""One answer as text: its tokens decoded as they come, thoughts kept apart, ended at a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from tpctl.client.reasoning import Form
from tpctl.client.reasoning_stream import Segment, Whole, splitter
from tpctl.client.tokenizer import Tokenizer
from tpctl.client.tool_stream import call_splitter
from tpctl.client.tools.asked import Tools
from tpctl.client.tools.calls import CallPiece, Calls, ToolCall
from tpctl.client.turns import Part, Turn, parts
from tpctl.wire.messages import Output
from tpctl.wire.report import TokenLogprob


class StopStrings:
    """Finds the first of several strings in text that comes in pieces, and holds back what may begin one.

    Attributes:
        any: whether there are any; without, every text is safe.
        found: whether one has come.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [(string, borders(string)) for string in strings if string]
        self._firsts = frozenset(string[0] for string, _ in self._strings)
        self._begun = [0] * len(self._strings)  # characters of each that the text so far ends with
        self._held = ""
        self.found = False
        self.any = bool(self._strings)

    def push(self, piece: str) -> str:
        """The text that is safe to show; after a stop string was ``found`` there is no more."""
        if self.found:
            return ""
        if not self._held and self._firsts.isdisjoint(piece):  # as nearly all, which begin none
            return piece
        text = self._held + piece
        ends = [at - len(string) for string, at in self._walk(piece, stop=True)]
        if ends:
            self.found, start = True, len(self._held) + min(ends)
            self._held = ""
            return text[:start]
        return self._safe(text)

    def skip(self, piece: str) -> str:
        """The same for text in which no string counts, unless what follows completes one."""
        self._walk(piece, stop=False)
        return self._safe(self._held + piece)

    def finish(self) -> str:
        """What was held back and turned out to begin nothing."""
        held, self._held = self._held, ""
        self._begun = [0] * len(self._strings)
        return held

    def _walk(self, piece: str, *, stop: bool) -> list[tuple[str, int]]:
        """Follow new text, a character at a time, whatever is held back.

        Returns:
            Strings that are whole in it, and where in ``piece`` each ends first; with ``stop`` alone.
        """
        ended = []
        for which, (string, falls) in enumerate(self._strings):
            have = self._begun[which]
            if not have and string[0] not in piece:
                continue
            for at, character in enumerate(piece, start=1):
                while have and string[have] != character:
                    have = falls[have - 1]
                if string[have] == character:
                    have += 1
                if have == len(string):
                    have = falls[-1]
                    if stop:
                        ended.append((string, at))
                        break
            self._begun[which] = have
        return ended

    def _safe(self, text: str) -> str:
        """Hold back what may begin a string."""
        keep = max(self._begun, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


@lru_cache(maxsize=64)
def borders(string: str) -> tuple[int, ...]:
    """For each beginning of ``string``, how long the longest beginning is that it ends with, itself not counted.

    Knuth, Morris, Pratt, "Fast pattern matching in strings", 1977: a text is then searched in steps that its length
    alone bounds, whatever it has in common with ``string``.
    """
    found = [0] * len(string)
    have = 0
    for at in range(1, len(string)):
        while have and string[have] != string[at]:
            have = found[have - 1]
        have += string[have] == string[at]
        found[at] = have
    return tuple(found)


class TextStream:
    """Collects the outputs of one request.

    Attributes:
        text: everything of the answer shown so far.
        reasoning: what was thought before it; ``None`` where thoughts are not told from answers.
        token_ids: the tokens behind it, with the end-of-sequence token if there was one.
        finish_reason: ``None`` while it goes on, then the engine's, or "stop" once a stop string was found;
            "tool_calls" in the place of "stop" where there are calls.
        num_cached_tokens: prompt tokens that the prefix cache spared.
        num_thought: of ``token_ids``, those of thoughts, their marks not.
        logprobs: one entry for each of ``token_ids``; empty if none were asked for.
        said: where there are any, places in ``token_ids`` of what the text is made of, thoughts, calls and marks not.
        turns: in what order texts, thoughts and calls were told.
        prompt_logprobs: one for each token of the prompt but the first, if asked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        prompt: Sequence[int] = (),
        min_tokens: int = 0,
        form: Form | None = None,
        tools: Tools | None = None,
    ) -> None:
        """Begin.

        Args:
            stop: texts that end the answer; in what is thought before it they count for nothing.
            prompt: the tokens that it follows.
            min_tokens: as in ``SamplingParams``.
            form: how what is thought is marked.
            tools: functions that it may call.
        """
        self._called = None if tools is None else call_splitter(tokenizer, prompt, form, tools)
        self._splitter = self._called or splitter(tokenizer, prompt, form)
        self._calls = Calls()
        self._min_tokens = min_tokens
        self._stop = StopStrings(stop)
        self._plain = tools is None and not self._stop.any
        self._text = self._splitter.detokenizer.push if self._plain and isinstance(self._splitter, Whole) else None
        self._pieces: list[str] = []
        self._thoughts: list[str] | None = None if form is None else []
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.num_cached_tokens = 0
        self.num_thought = 0
        self.logprobs: list[TokenLogprob] = []
        self.said: list[int] = []
        self.turns: list[Turn] = []
        self._kind = ""  # of the last one
        self._apart = self._was_apart = False  # whether text comes behind a call; and before the last call began
        self._unsaid: list[int] = []  # places of tokens whose text is held back
        self._tokenizer = tokenizer
        self.prompt_logprobs: list[TokenLogprob] | None = None

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def parts(self) -> list[Part]:
        """The answer's texts, thoughts and calls in their order."""
        return parts(self.turns, self._calls, self._pieces, self._thoughts or ())

    @property
    def reasoning(self) -> str | None:
        return None if self._thoughts is None else "".join(self._thoughts)

    @property
    def stopped_early(self) -> bool:
        """Whether a stop string or a call ended it, of which the engine does not know: the request must be aborted."""
        return self._stop.found or self._called_enough

    @property
    def calls(self) -> list[ToolCall]:
        """Calls of tools; once it has ended whole ones, but for one that its limit of tokens cut off."""
        return self._calls.all()

    @property
    def _called_enough(self) -> bool:
        return self._called is not None and self._called.over

    def push(self, output: Output) -> list[Segment]:
        """Take in an output of the engine; returns the text it adds, piece by piece."""
        if self.finish_reason is not None:
            return []
        if output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = self.prompt_logprobs or []
            self.prompt_logprobs += output.prompt_logprobs
            if not output.token_ids and output.finish_reason is None:
                return []
        if self._plain and output.finish_reason is None and len(output.token_ids) == 1:
            return self._push_one(output)
        shown: list[Segment] = []
        last = len(output.token_ids) if output.finish_reason == "stop" else 0
        for position, id in enumerate(output.token_ids, start=1):
            self.token_ids.append(id)
            if output.logprobs is not None:
                self.logprobs.append(output.logprobs[position - 1])
            if position == last:  # the token that stopped it is no part of the text
                break
            early = len(self.token_ids) <= self._min_tokens
            shown += self._told(self._pushed(id), None if output.logprobs is None else id, early=early)
            if self._stop.found or self._called_enough:
                break
        if self._stop.found or self._called_enough:
            self.finish_reason = "stop"
        elif output.finish_reason is not None:
            if self._called is not None and output.finish_reason == "length":
                self._called.cut()
            shown += self._told(self._splitter.finish())
            if rest := self._stop.finish():
                shown += self._keep([Segment(rest)])
            self.finish_reason = "stop" if self._stop.found else output.finish_reason
        if self.finish_reason == "stop" and self.calls:
            self.finish_reason = "tool_calls"
        return shown

    @property
    def bare(self) -> bool:
        """Whether a token's text is the next of the answer and nothing else: it has no thoughts, calls, stop texts."""
        return self._text is not None

    def add(self, id: int) -> str:
        """As ``push`` of an output that says one token alone, if it is ``bare``; the text that it adds."""
        assert self._text is not None
        self.token_ids.append(id)
        if text := self._text(id):
            if not self._kind:
                self._turn("message", 0)
            self._pieces.append(text)
        return text

    def _push_one(self, output: Output) -> list[Segment]:
        """A token among others, as nearly all are, where nothing in its text ends the answer."""
        id = output.token_ids[0]
        self.token_ids.append(id)
        shown = self._splitter.push(id) if self._thoughts is None else self._pushed(id)
        if output.logprobs is not None:
            self.logprobs += output.logprobs
            return self._told(shown, id)
        if len(shown) != 1:
            return self._keep(shown) if shown else shown
        text, thought, _ = shown[0]
        kept, kind = (self._thoughts, "reasoning") if thought else (self._pieces, "message")
        if kept is None or self._kind != kind:
            return self._keep(shown)
        kept.append(text)
        return shown

    def _pushed(self, id: int) -> list[Segment]:
        """The text that a token completes. One that opens or closes a thought is no part of it."""
        if self._thoughts is None:
            return self._splitter.push(id)
        thinking = self._splitter.thinking
        found = self._splitter.push(id)
        if thinking and self._splitter.thinking:
            self.num_thought += 1
        return found

    def _told(self, new: list[Segment], id: int | None = None, *, early: bool = False) -> list[Segment]:
        """What is shown of new text; ``early``: no stop string counts in it. It is made of the last token ``id``,
        where that is of interest, and of those that have been held back: one without text is part of what follows."""
        if id is not None and id not in self._tokenizer.marks:
            self._unsaid.append(len(self.token_ids) - 1)
        if not new:
            return new
        said, self._unsaid = self._unsaid, []
        shown = self._keep(self._safe(new, early=early) if self._stop.any else new)
        if not (new[-1].reasoning or new[-1].call):
            self.said += said
        return shown

    def _keep(self, shown: list[Segment]) -> list[Segment]:
        """Note what is shown, and in what order. Text behind a call is a blank line apart from that before it."""
        found = []
        for segment in shown:
            text, reasoning, call = segment
            if call is not None:
                self._keep_call(call)
            elif reasoning and self._thoughts is not None:
                self._turn("reasoning", len(self._thoughts))
                self._thoughts.append(text)
            else:
                if self._apart:
                    if not (text := text.lstrip()):
                        continue
                    segment, self._apart = Segment(text := f"\n\n{text}" if self._pieces else text), False
                self._turn("message", len(self._pieces))
                self._pieces.append(text)
            found.append(segment)
        return found

    def _keep_call(self, piece: CallPiece) -> None:
        self._calls.push(piece)
        if piece.id is not None:
            self._kind = ""  # it is another one
            self._turn("function_call", piece.at)
            self._was_apart, self._apart = self._apart, True
        elif piece.taken_back:
            self._apart = self._was_apart

    def _turn(self, kind: str, first: int) -> None:
        if kind != self._kind:
            self._kind = kind
            if self.turns:
                self.turns[-1].said = len(self.said)
            self.turns.append(Turn(kind, first))

    def _safe(self, segments: list[Segment], *, early: bool) -> list[Segment]:
        """What of new text stands before a stop string for certain. A text ends where a thought or a call begins: what
        it ends with is told before that, and no string goes on behind it."""
        found = []
        for segment in segments:
            if segment.call is None and not segment.reasoning:
                if text := (self._stop.skip if early else self._stop.push)(segment.text):
                    found.append(Segment(text))
                if self._stop.found:
                    break
                continue
            if rest := self._stop.finish():
                found.append(Segment(rest))
            found.append(segment)
        return found
