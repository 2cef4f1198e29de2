"""Decides, step by step, which sequences compute how many tokens.

Deterministic and free of torch: every rank runs its own copy on the same requests and reaches the same decisions, so
no schedule ever travels between ranks.

One step takes a budget of tokens. Running sequences come first, oldest first: a decode needs one token, an unfinished
prefill as much as fits (chunked prefill). What is left admits waiting sequences, whose cached prefix costs nothing.
With a ``Pace``, prompts may have a smaller budget, and the longest answers are then admitted first.
Where layers have a window, a chunk is made as small as there are blocks for.
When blocks run out, the youngest running sequence is preempted: it gives up its blocks and waits to be computed again
from its tokens, which prefix caching often makes cheap. So does, once, a sequence that grows beyond the length up to
which its keys were to be rotated as they are (long RoPE).

A sequence whose scores are not finite ends with "error", and its blocks are found by nobody any more. If it had read
blocks that another one computed, it is first computed again without them: that one may be to blame.

A sequence whose grammar takes long to say what may come next is left out: it gives up its blocks, as if preempted, and
waits for nothing that this process knows, until ``found`` says that it may go on.

A step may be started before the results of the one before it are known (``Sequence.num_in_flight``): ``schedule`` and
``commit`` then overlap by one step, and a sequence that turns out to have ended costs one wasted row.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass

from tpctl.engine.scheduling.block_manager import BlockManager, Prefix
from tpctl.engine.scheduling.drafting import Drafting
from tpctl.engine.scheduling.limits import Limits
from tpctl.engine.scheduling.pacing import Pace, Pacer
from tpctl.engine.scheduling.scheduled import ScheduledBatch, ScheduledSequence
from tpctl.engine.scheduling.sequence import LATE, NOT_FINITE, REFUSED, Sequence
from tpctl.engine.scheduling.speculation import Speculation, verified
from tpctl.engine.scheduling.states import StatePool
from tpctl.engine.scheduling.step import Step
from tpctl.wire.messages import Output, Request
from tpctl.wire.report import TokenLogprob
from tpctl.wire.scoring import TokenScore


@dataclass
class SchedulerStats:
    """Counters since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    paced_steps: int = 0


class Scheduler:
    """Policy over a block manager.

    Args:
        rope_offset: which rotary table rotates all keys of a sequence of so many tokens.
        states: of a model with recurrent layers; a sequence runs with a slot of its own.
        pace: spread prompts over the steps where that ends all requests sooner (``engine.scheduling.pacing``).
        speculation: propose tokens (``engine.scheduling.speculation``); a step with any is to be committed before the
            next one is scheduled.
    """

    def __init__(
        self,
        blocks: BlockManager,
        limits: Limits,
        *,
        rope_offset: Callable[[int], int] = lambda num_tokens: 0,
        pace: Pace | None = None,
        states: StatePool | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self.blocks = blocks
        self.states = states
        self.limits = limits
        self.rope_offset = rope_offset
        self.pacer = None if pace is None else Pacer(pace, blocks.room)
        self.waiting: list[Sequence] = []  # the next to be admitted first
        self.running: dict[str, Sequence] = {}  # by id, oldest admission first
        self.left_out: dict[str, Sequence] = {}  # by id; they hold no blocks
        self.drafting: Drafting | None = None
        if speculation is not None:
            self.drafting = Drafting(
                speculation,
                blocks,
                states,
                self.running,
                self.waiting,
                limits,
                rope_offset,
            )
        self.stats = SchedulerStats()
        self._by_id: dict[str, Sequence] = {}
        self._arrivals = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished, but for those that are left out."""
        return len(self._by_id) > len(self.left_out)

    def add(self, request: Request) -> Output | None:
        """Queue a request; an ``Output`` with "error" if it cannot be served."""
        message = self.limits.refusal(request)
        if message is None and request.id in self._by_id:
            message = f"request id {request.id!r} is already in use"
        if message is not None:
            return Output(request.id, [], "error", message)
        sequence = self.limits.sequence(request)
        sequence.arrival = self._arrivals
        self._arrivals += 1
        if self.pacer is not None:
            self.pacer.arrived(self.stats.steps, sequence.max_num_tokens - sequence.num_prompt_tokens)
        self._by_id[request.id] = sequence
        self.waiting.append(sequence)
        self.stats.prompt_tokens += sequence.num_prompt_tokens
        return None

    def abort(self, id: str) -> Output | None:
        """End a request early; ``None`` if it has already ended."""
        sequence = self._by_id.get(id)
        if sequence is None:
            return None
        self._finish(sequence)
        return Output(id, [], "abort")

    def found(self, id: str, problem: str | None) -> Output | None:
        """Let a sequence go on that was left out, or end for a ``problem``. It may have ended before."""
        sequence = self.left_out.get(id)
        if sequence is None:
            return None
        if problem is not None:
            self._finish(sequence)
            return Output(id, [], "error", problem)
        del self.left_out[id]
        self.waiting.insert(0, sequence)
        return None

    def schedule(self) -> ScheduledBatch | None:
        """Choose the next step's work; ``None`` when nothing can be computed now."""
        budget = self.limits.max_num_batched_tokens
        paced = None if self.pacer is None else self.pacer.order(self.stats.steps, self.running.values(), self.waiting)
        drafts = 0 if self.drafting is None else self.drafting.most(len(self._by_id))
        step = Step(budget, *(paced or (budget, budget)), drafts)
        if self.states is not None:
            self.states.begin()
        preempted = self._schedule_running(step)
        if self.waiting and not preempted:
            self._admit_waiting(step)
        if not step.items:
            return None
        items = [item for item in step.items if item.is_decode]
        num_decodes = len(items)
        if num_decodes < len(step.items):
            items += [item for item in step.items if not item.is_decode]
        batch = ScheduledBatch(items, num_decodes, paced is not None)
        self.stats.steps += 1
        self.stats.computed_tokens += batch.num_tokens
        self.stats.paced_steps += batch.paced
        return batch

    def commit(
        self,
        batch: ScheduledBatch,
        token_ids: SequenceType[int],
        logprobs: SequenceType[TokenLogprob | None] | None = None,
    ) -> list[Output]:
        """Take in the tokens that a step sampled, as many for each of the batch's ``sampled`` as it has ``places``.

        Returns:
            What is new for each request that is still wanted.
        """
        outputs: list[Output] = []
        end = 0
        for item in batch.sampled:
            row, end = end, end + 1 + len(item.drafts)
            sequence = item.sequence
            if sequence.num_stale:
                sequence.num_stale -= 1
                continue
            sequence.num_in_flight -= 1
            if sequence.finished:
                continue
            if token_ids[row] in (REFUSED, LATE):
                outputs += self._unguided(sequence, token_ids[row])
                continue
            came = list(verified(item.drafts, token_ids[row:end])) if item.drafts else [token_ids[row]]
            broken = came[-1] == NOT_FINITE
            if broken:
                del came[-1]
            if came:
                reported = None if logprobs is None else logprobs[row : row + len(came)]
                ended = self._take(item, came, reported, outputs)
            if broken and not (came and ended):
                outputs += self._take_back(sequence)
        assert end == len(token_ids)
        return outputs

    def _unguided(self, sequence: Sequence, why: int) -> list[Output]:
        """Stop a sequence that has no mask: for good, or until there is one."""
        if why == REFUSED:
            self._finish(sequence)
            return [Output(sequence.id, [], "error", sequence.problem)]
        self._stop_running(sequence)
        self.left_out[sequence.id] = sequence
        return []

    def _take(
        self,
        item: ScheduledSequence,
        came: list[int],
        logprobs: SequenceType[TokenLogprob | None] | None,
        outputs: list[Output],
    ) -> bool:
        """Take in an item's tokens and tell of them in ``outputs``; whether its sequence has ended."""
        sequence, reason = item.sequence, None
        for count, token in enumerate(came, 1):
            sequence.token_ids.append(token)
            reason = sequence.finish_reason(token)
            if reason is not None:
                del came[count:]
                break
        self.stats.generated_tokens += len(came)
        if self.drafting is not None:
            self.drafting.learn(item, came)
        note, scores = (None, None) if reason is None else self._end(sequence, reason)
        told = None if logprobs is None else [one for one in logprobs[: len(came)] if one is not None] or None
        prompt = None if sequence.params.prompt_logprobs is None else sequence.told_prompt_logprobs()
        first = len(sequence.token_ids) - len(came) == sequence.num_prompt_tokens
        cached = sequence.num_cached_tokens if first else 0
        outputs.append(Output(sequence.id, came, reason, note, told, cached, scores, prompt))
        return reason is not None

    def _end(self, sequence: Sequence, reason: str) -> tuple[str | None, list[TokenScore] | None]:
        """Finish a sequence as its tokens wanted; what is noted of that, and its scores."""
        self._finish(sequence)
        self.stats.finished += 1
        if self.pacer is not None:
            self.pacer.ended(sequence)
        scored = sequence.scoring is not None
        scores = [sequence.scores[place] for place in sorted(sequence.scores)] if scored else None
        return self.limits.note(sequence, reason), scores

    def check_integrity(self) -> None:
        """Check the block manager's books against the sequences (see ``BlockManager.check_integrity``)."""
        waiting = [*self.waiting, *self.left_out.values()]
        assert all(not sequence.block_tables for sequence in waiting), "a waiting sequence holds blocks"
        assert set(self._by_id) == set(self.running) | {s.id for s in waiting}, "a request is lost"
        self.blocks.check_integrity(list(self.running.values()))
        if self.states is not None:
            self.states.check_integrity(list(self.running.values()))

    def _schedule_running(self, step: Step) -> bool:
        """Give running sequences their tokens, oldest first; whether any had to be preempted."""
        preempted = False
        turned: list[Sequence] = []
        for sequence in list(self.running.values()):
            if step.budget == 0:
                break
            if sequence.id not in self.running or sequence.awaits_its_end:
                continue
            if self.rope_offset(sequence.num_tokens) != sequence.rope_offset:
                self._stop_running(sequence)
                turned.append(sequence)
                continue
            tokens = step.room(sequence.num_uncomputed_tokens)
            if tokens == 0:
                continue
            drafts = () if self.drafting is None else self.drafting.propose(sequence, tokens, step.drafts)
            if drafts and not self.blocks.grow(sequence, sequence.num_computed_tokens + tokens + len(drafts)):
                drafts = ()
            if not self.blocks.grow(sequence, sequence.num_computed_tokens + tokens):
                tokens, more = self._make_room(step, sequence, tokens)
                preempted |= more
            if tokens:
                self._choose(step, sequence, tokens, drafts)
        self.waiting[:0] = turned
        if self.drafting is not None and not preempted:
            self.drafting.grow_ahead(step.items)
        return preempted

    def _make_room(self, step: Step, sequence: Sequence, tokens: int) -> tuple[int, bool]:
        """Give a running sequence blocks for ``tokens`` more: for fewer where layers have a window, else those of the
        youngest that the step has not chosen, itself in the end. How many it can compute now, and whether any was
        preempted."""
        preempted = False
        while not self.blocks.grow(sequence, sequence.num_computed_tokens + tokens):
            if tokens > 1 and self.blocks.has_windows:
                tokens //= 2
                continue
            victim = next(s for s in reversed(self.running.values()) if s.id not in step.chosen)
            self._preempt(victim)
            preempted = True
            if victim is sequence:
                # What it finds of itself may lie in so many slabs that too few are left for its windows; a sequence
                # that runs by itself has room if it takes all of its blocks anew.
                sequence.alone |= not self.running
                return 0, True
        return tokens, preempted

    def _admit_waiting(self, step: Step) -> None:
        states = self.states
        while self.waiting and step.has_room and self._has_place:
            sequence = self.waiting[0]
            if sequence.num_in_flight:
                break  # preempted with a token under way; its id is needed before it can be computed again
            sequence.rope_offset = self.rope_offset(sequence.num_tokens)
            prefix = (self.blocks if states is None else states).match_prefix(sequence)
            tokens = self._admit(sequence, prefix, step)
            if not tokens and not self.running and prefix.blocks:  # as of one that has preempted itself
                prefix = self.blocks.nothing
                tokens = self._admit(sequence, prefix, step)
            if not tokens:
                break
            if states is not None:
                states.admit(sequence, prefix)
            del self.waiting[0]
            self.running[sequence.id] = sequence
            self._choose(step, sequence, tokens)

    def _admit(self, sequence: Sequence, prefix: Prefix, step: Step) -> int:
        """Give a sequence its blocks, if there are enough; how many tokens of it to compute in this step."""
        total = len(sequence.token_ids)
        tokens = step.room(total - prefix.blocks * self.blocks.block_size)
        # Blocks for the whole prompt are taken at once, and each running sequence keeps one to grow into, so that
        # admitting does not lead straight to preempting.
        return self.blocks.admit(sequence, prefix, total, tokens, self.running.values())

    @property
    def _has_place(self) -> bool:
        """Whether one more sequence can run, as far as blocks allow."""
        return len(self.running) < self.limits.max_num_seqs and (self.states is None or self.states.has_room)

    def _choose(self, step: Step, sequence: Sequence, tokens: int, drafts: tuple[int, ...] = ()) -> None:
        start = sequence.num_computed_tokens
        samples = start + tokens == sequence.num_tokens
        step.take(sequence.id, tokens, len(drafts), part=not samples or tokens > 1)
        tokens += len(drafts)
        sequence.num_computed_tokens = start + tokens
        sequence.num_in_flight += samples
        # Shared from now on, before it is computed: in every layer all keys of a step are stored before any sequence
        # of the step reads them.
        self.blocks.register(sequence)
        state = None
        if self.states is not None:
            state = self.states.use(sequence, start, start + tokens - len(drafts), len(drafts))
        step.items.append(ScheduledSequence(sequence, start, tokens, samples, state, drafts))

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self.waiting.insert(0, sequence)
        self.stats.preemptions += 1

    def _stop_running(self, sequence: Sequence) -> None:
        del self.running[sequence.id]
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)
        if self.states is not None:
            self.states.release(sequence)

    def _take_back(self, sequence: Sequence) -> list[Output]:
        """What becomes of a sequence whose next token cannot be chosen."""
        self.blocks.forget(sequence)
        if self.states is not None:
            self.states.forget(sequence)
        if sequence.has_shared and not sequence.alone:
            sequence.alone = True
            # Of a token that does not exist a later step has already computed the next one.
            sequence.num_stale, sequence.num_in_flight = sequence.num_in_flight, 0
            if sequence.id in self.running:
                self._stop_running(sequence)
                self.waiting.insert(0, sequence)
            return []
        self._finish(sequence)
        return [Output(sequence.id, [], "error", sequence.not_finite)]

    def _finish(self, sequence: Sequence) -> None:
        sequence.finished = True
        del self._by_id[sequence.id]
        if self.drafting is not None:
            self.drafting.speculation.forget(sequence)
        if self.running.pop(sequence.id, None) is not None:
            self._release(sequence)
        elif self.left_out.pop(sequence.id, None) is None:
            self.waiting.remove(sequence)
