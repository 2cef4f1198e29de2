"""One rank's engine: the scheduler and the model runner, stepped together.

Every rank builds the same engine, applies the same requests at the same steps, and therefore makes the same schedule
and samples the same tokens; only rank 0's outputs are sent anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from tpctl.distributed import TPGroup
from tpctl.engine.guiding.guides import Guides
from tpctl.engine.launch_time import LaunchTime
from tpctl.engine.runners.plain import make_plain_runner
from tpctl.engine.runners.runner import Launched, ModelRunner
from tpctl.engine.scheduling.block_manager import BlockManager
from tpctl.engine.scheduling.limits import Limits
from tpctl.engine.scheduling.scheduler import Scheduler
from tpctl.engine.scheduling.speculation import NgramDrafter, Speculation
from tpctl.engine.scheduling.states import StatePool
from tpctl.layers.attention.select import choose_backend
from tpctl.wire.messages import Abort, Add, Found, Message, Output
from tpctl.wire.report import EngineInfo, EngineStats
from tpctl.wire.settings import EngineConfig

_WITHIN_HOST, _BETWEEN_HOSTS = 0.2e-3, 1e-3  # seconds by which other ranks may start a step later than rank 0


class Engine:
    """Continuous batching on one rank.

    Raises:
        EngineError: the settings do not fit the model or the memory.
    """

    def __init__(
        self,
        config: EngineConfig,
        group: TPGroup,
        guides: Guides | None = None,
        compiled: Callable[[], object] = lambda: None,
    ) -> None:
        """``guides``: rank 0's, where requests may have grammars; they are there before their requests come.
        ``compiled``: as of ``make_runner``."""
        self.config = config
        self.runner = make_runner(config, group, compiled)
        self._guides = self.runner.masks.guides = guides
        self._pending: Launched | None = None
        self._ended: Launched | None = None  # the one before
        self._launch_time = launch_time(group) if config.late_launch and group.rank == 0 else None
        model, memory = self.runner.loaded.config, self.runner.memory
        self.speculation = self._speculation()
        blocks = BlockManager(
            memory.num_blocks, self.runner.backend.block_size, config.enable_prefix_caching, memory.layout
        )
        self.scheduler = Scheduler(
            blocks,
            Limits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=memory.max_model_len,
                vocab_size=model.vocab_size,
                eos_token_ids=frozenset(model.eos_token_ids),
                context_full=memory.context_full,
            ),
            rope_offset=self.runner.rope_offset,
            pace=self.runner.pace,
            states=self._states(blocks),
            speculation=self.speculation,
        )
        if guides is not None:
            guides.grammars.suit(model.vocab_size, model.eos_token_ids)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do now. There may be requests that are left out until a ``Found``."""
        return self.scheduler.has_work or self._pending is not None

    def apply(self, message: Message) -> list[Output]:
        """Take in new requests or aborts; what they lead to at once."""
        outputs: list[Output | None] = []
        if isinstance(message, Add):
            outputs = [self.scheduler.add(request) for request in message.requests]
        elif isinstance(message, Abort):
            outputs = [self.scheduler.abort(id) for id in message.ids]
        elif isinstance(message, Found):
            outputs = [self.scheduler.found(message.id, message.problem)]
        return self._told([output for output in outputs if output is not None])

    def patience(self) -> float:
        """Seconds for which requests are best waited for before ``step``: what comes meanwhile is computed as soon.

        With speculation none: the next step often waits for this one's tokens anyway.
        """
        if self._launch_time is None or self.speculation is not None:
            return 0.0
        return self._launch_time.left(self._pending, self._ended)

    def step(self) -> list[Output]:
        """Start a step and take in the one before; the tokens of that one.

        Where the runner cannot start a step before the last one's tokens are known, both are the same step; and where
        tokens can be guessed from them, they are waited for.
        """
        outputs: list[Output] = []
        if self._pending is not None and (
            not self.runner.may_overlap(self._pending.batch)
            or (self.scheduler.drafting is not None and self.scheduler.drafting.propose_ahead())
        ):
            outputs += self._collect()
        batch = self.scheduler.schedule()
        launched = None if batch is None else self.runner.launch(batch)
        outputs += self._collect()
        self._pending = launched
        if launched is not None and not self.runner.may_overlap(launched.batch):
            outputs += self._collect()
        return outputs

    def _collect(self) -> list[Output]:
        """Wait for the step under way, if any, and take in its tokens."""
        launched, self._pending = self._pending, None
        if launched is None:
            return []
        outputs = self.scheduler.commit(launched.batch, *self.runner.collect(launched))
        self._ended = launched
        return outputs if self._guides is None else self._told(outputs)

    def _told(self, outputs: list[Output]) -> list[Output]:
        """Outputs as they are; the grammars of requests that have ended are no longer needed."""
        if self._guides is not None:
            for output in outputs:
                if output.finish_reason is not None:
                    self._guides.drop(output.id)
        return outputs

    def _speculation(self) -> Speculation | None:
        """What proposes tokens, if anything is to."""
        if self.config.speculate == "off":
            return None
        if self.runner.speculation is not None:
            return self.runner.speculation
        return Speculation(NgramDrafter(), self.runner.row_cost, self.runner.most_rows)

    def _states(self, blocks: BlockManager) -> StatePool | None:
        """Of a model with recurrent layers."""
        slots = self.runner.memory.num_states
        return StatePool(slots, blocks, apart=self.runner.states_apart) if slots else None

    def info(self) -> EngineInfo:
        return replace(self.runner.info(), speculation="off" if self.speculation is None else self.speculation.kind)

    def stats(self) -> EngineStats:
        """Counters since the start, and how many KV blocks are free.

        When nothing is being computed, the block manager's books are checked on the way.
        """
        scheduler, blocks, launches = self.scheduler.stats, self.scheduler.blocks, self._launch_time
        if not self.has_work:
            self.scheduler.check_integrity()
        return EngineStats(
            steps=scheduler.steps,
            prompt_tokens=scheduler.prompt_tokens,
            computed_tokens=scheduler.computed_tokens,
            generated_tokens=scheduler.generated_tokens,
            preemptions=scheduler.preemptions,
            paced_steps=scheduler.paced_steps,
            prefix_cache_queried_tokens=blocks.queried_tokens,
            prefix_cache_hit_tokens=blocks.hit_tokens,
            evictions=blocks.evictions,
            num_blocks=blocks.num_slabs,
            free_blocks=blocks.num_free_slabs,
            device_memory=self.runner.device_memory(),
            reserved_memory=self.runner.reserved_memory(),
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + len(self.scheduler.left_out),
            draft_tokens=0 if self.speculation is None else self.speculation.drafted,
            accepted_tokens=0 if self.speculation is None else self.speculation.accepted,
            held_steps=0 if launches is None else launches.held_steps,
            late_steps=0 if launches is None else launches.late_steps,
        )


def launch_time(group: TPGroup) -> LaunchTime:
    """When rank 0 launches steps: earlier where others have to hear of it."""
    return LaunchTime(0.0 if group.size == 1 else _WITHIN_HOST if group.one_host else _BETWEEN_HOSTS)


def make_runner(config: EngineConfig, group: TPGroup, compiled: Callable[[], object] = lambda: None) -> ModelRunner:
    """The runner for the device and the attention backend (collective).

    Args:
        compiled: waits for kernels that are being compiled; called before the first is launched.

    Raises:
        EngineError: the settings do not fit the model or the memory.
    """
    # Whether the backend suits the dtype is for the runner to say, which knows what "auto" means there.
    backend = choose_backend(config.attention_backend, group.device.type, torch.bfloat16)
    if group.device.type == "cuda" and backend != "sdpa":
        from tpctl.engine.runners.cuda_start import make_cuda_runner

        return make_cuda_runner(config, group, compiled)
    return make_plain_runner(config, group)
