"""Threads for what would hold up the event loop. Each kind of work has its own, so that none waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

from tpctl.client.grammar_process import MOST
from tpctl.client.guides import Tried, Untried, without_trials
from tpctl.errors import TpctlError
from tpctl.serve.errors import ApiError
from tpctl.serve.trials import Trials
from tpctl.wire.guide import Guide

T = TypeVar("T")

_PROMPTS, _FORMED, _ASIDE, _ANSWERS = 8, 4, 2, 2  # threads, which start when they are needed
MOST_ASIDE = 256
"""Pieces of work that no answer of the model comes of, under way and waiting."""


class Threads:
    """As a context manager it drops what waits, and waits for what is under way."""

    def __init__(self) -> None:
        self._prompts = ThreadPoolExecutor(_PROMPTS, "tpctl-serve-prompts")
        self._formed = ThreadPoolExecutor(_FORMED, "tpctl-serve-formed")
        self._aside = ThreadPoolExecutor(_ASIDE, "tpctl-serve-aside")
        self._answers = ThreadPoolExecutor(_ANSWERS, "tpctl-serve-answers")
        self._grammars = ThreadPoolExecutor(MOST, "tpctl-serve-grammars")
        self._trials = Trials(self._grammars)
        self._all = (self._prompts, self._formed, self._grammars, self._aside, self._answers)
        self._asides = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.drop()
        for executor in self._all:
            executor.shutdown()

    def drop(self) -> None:
        """Do nothing more than what is under way."""
        for executor in self._all:
            executor.shutdown(wait=False, cancel_futures=True)

    async def prompt(self, work: Callable[..., T], *arguments: Any) -> T:
        """Make prompts of what is asked. Raises ``ApiError`` for what the world has done wrong, as all of these."""
        return await _run(self._prompts, work, *arguments)

    async def formed(self, client: str, work: Callable[..., T], *arguments: Any) -> T:
        """The same where answers are to have a form. To see whether its grammar can be had may take seconds, for which
        the work is left and begun again: where it is known nobody waits for those of others.

        Args:
            client: whose turn it is to have one tried.
        """
        found: dict[Guide, Tried] = {}
        while True:
            try:
                return await _run(self._formed, without_trials, found, work, *arguments)
            except Untried as one:
                guide = one.guide
            try:
                found[guide] = await self._trials.tried(guide, client)
            except TpctlError as error:
                raise ApiError.of(error) from None

    async def aside(self, work: Callable[..., T], *arguments: Any) -> T:
        """What is asked beside answers of the model. Raises ``ApiError`` also if there is too much of it."""
        if self._asides >= MOST_ASIDE:
            raise ApiError(
                429,
                f"{self._asides} requests for tokens or texts are under way or wait, which is as many as this server "
                "takes; try again later",
                code="queue_full",
                retry_after=1,
            )
        self._asides += 1
        try:
            return await _run(self._aside, work, *arguments)
        finally:
            self._asides -= 1

    async def answer(self, work: Callable[..., T], *arguments: Any) -> T:
        """Make JSON of an answer."""
        return await _run(self._answers, work, *arguments)


async def _run(executor: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    piece = [work, arguments]  # emptied when nobody waits for it any more: a queue keeps what was cancelled
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, _done, piece)
    except TpctlError as error:
        raise ApiError.of(error) from None
    finally:
        piece.clear()


def _done(piece: list[Any]) -> Any:
    work, arguments = piece
    piece.clear()
    return work(*arguments)
