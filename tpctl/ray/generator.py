"""An engine in an actor of Ray Data, which answers the rows of the batches that it is given."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from os import PathLike
from typing import Any

from tpctl.client.batch import Batch
from tpctl.client.jobs import JobParser, Line
from tpctl.client.llm import LLM
from tpctl.errors import EngineError, UsageError
from tpctl.ray.tables import column, columns_of, with_columns
from tpctl.wire.sampling import SamplingParams

DEATHS = 5
"""Engines that die in a row, without a row answered in between, before that is the job's error."""

ALONE = 2
"""Engines that die over a row while it is the only one, before it becomes an error row."""

TEXTS = ("text", "finish_reason", "note", "error")
NUMBERS = ("prompt_tokens", "completion_tokens")
_TOGETHER = 32  # rows that are parsed at once
_OF_ROWS = (frozenset(asdict(SamplingParams())) - {"logprobs", "prompt_logprobs", "guide_after", "guide_name"}) | {
    "stop",
    "chat_template_kwargs",
}


class Generator:
    """For ``map_batches`` of a dataset of Ray Data: a callable whose actor has one engine.

        dataset.map_batches(
            tpctl.ray.Generator,
            fn_constructor_kwargs={"model": "demo", "tp": 2, "sampling": {"max_tokens": 64}},
            batch_size=256,
            num_gpus=2,  # tp
            concurrency=4,  # engines
        )

    A row's ``prompt`` (a text) or ``messages`` (a conversation) is answered. The batch comes back with all that it
    had, and columns ``text``, ``finish_reason``, ``prompt_tokens``, ``completion_tokens``, ``note`` (why the context,
    and not ``max_tokens``, ended an answer), ``error``, and, where the model's chat template marks it, ``reasoning``. A
    row that cannot be answered has an ``error`` and no ``text``, and its ``finish_reason`` is ``"error"``.
    """

    def __init__(
        self,
        model: str | PathLike[str] = "demo",
        tp: int | None = None,
        *,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        stop: str | Sequence[str] = (),
        prompt_column: str | None = None,
        sampling_columns: Sequence[str] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        prefix: str = "",
        **settings: Any,
    ) -> None:
        """Start the engine.

        Args:
            model, tp, settings: as of ``tpctl.LLM``.
            sampling: ``SamplingParams``, or some of its fields, for rows that do not set them; greedy and 256 tokens at
                most where it says nothing.
            stop: texts that end answers.
            prompt_column: holds texts or conversations; ``None``: ``prompt`` and ``messages``, whichever a row has.
            sampling_columns: columns whose names are fields of ``SamplingParams``, ``stop`` or
                ``chat_template_kwargs``, and which set them for their row. A row without a seed has one made of
                ``seed``, of what it asks, and of how often it was asked before in the batch.
            chat_template_kwargs: for the chat template of every row.
            prefix: of the new columns' names.

        Raises:
            TpctlError: the model cannot be had, or not be run in this way, or a setting is wrong.
        """
        if unknown := [name for name in sampling_columns if name not in _OF_ROWS]:
            raise UsageError(f"sampling_columns has {unknown[0]!r}; known: {', '.join(sorted(_OF_ROWS))}")
        given = asdict(sampling) if isinstance(sampling, SamplingParams) else dict(sampling or {})
        self._stop = [stop] if isinstance(stop, str) else list(stop)
        checked = SamplingParams.from_dict(given)
        if checked.logprobs is not None:
            raise UsageError("sampling has logprobs, which there is no column for; leave it out")
        self._seed = checked.seed
        self._sampling = given
        self._prompt_column = prompt_column
        self._columns = tuple(sampling_columns)
        self._template = dict(chat_template_kwargs or {})
        self._prefix = prefix
        self._model, self._tp = model, tp
        self._settings = {"scheduling_policy": "auto", **settings}
        if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():  # Ray's: the actor's CPUs, which ranks share
            os.environ["OMP_NUM_THREADS"] = str(max(1, int(threads) // (tp or 1)))
        self._lock = threading.Lock()
        self._llm: LLM | None = None
        self._engine()

    def __call__(self, batch: Any) -> Any:
        """Answer a batch: a dict of NumPy columns, a pandas ``DataFrame`` or a pyarrow ``Table``; the same comes back.

        An engine that dies is started again, and the rows it had answered are kept.

        Raises:
            EngineError: none stays alive, or none starts. The next call tries again.
            UsageError: the batch lacks a column, or has one of the new ones already.
        """
        names = columns_of(batch)
        self._check(names)
        lines, rows = self._lines(batch, names)
        self._answer(lines, rows)
        ordered = [rows[index] for index in range(len(rows))]
        texts = {name: [row.get(name) for row in ordered] for name in self._texts()}
        texts["finish_reason"] = ["error" if "error" in row else row["finish_reason"] for row in ordered]
        numbers = {name: [row.get(name, 0) for row in ordered] for name in NUMBERS}
        return with_columns(
            batch,
            {self._prefix + name: values for name, values in texts.items()},
            {self._prefix + name: values for name, values in numbers.items()},
        )

    def _texts(self) -> tuple[str, ...]:
        return TEXTS if self._engine().tokenizer.reasoning is None else (*TEXTS, "reasoning")

    def _check(self, names: Sequence[str]) -> None:
        wanted = [self._prompt_column] if self._prompt_column is not None else ["prompt", "messages"]
        if not any(name in names for name in wanted):
            raise UsageError(
                f"the batch has no column {' or '.join(wanted)}, but {', '.join(names)}; set prompt_column"
            )
        if missing := [name for name in self._columns if name not in names]:
            raise UsageError(f"the batch has no column {missing[0]}, which sampling_columns names")
        if taken := [name for name in (*self._texts(), *NUMBERS) if self._prefix + name in names]:
            raise UsageError(f"the batch has a column {self._prefix + taken[0]} already; give the new ones a prefix")

    def _lines(self, batch: Any, names: Sequence[str]) -> tuple[list[Line], dict[int, dict[str, Any]]]:
        """The rows as lines of a batch file, and error rows of those that are none, by their places."""
        chosen = [self._prompt_column] if self._prompt_column else [n for n in ("prompt", "messages") if n in names]
        asked = {name: column(batch, name) for name in chosen}
        own = {name: column(batch, name) for name in self._columns}
        lines: list[Line] = []
        rows: dict[int, dict[str, Any]] = {}
        seen: Counter[bytes] = Counter()
        for index in range(len(next(iter(asked.values())))):
            entry: dict[str, Any] = {name: values[index] for name, values in own.items() if values[index] is not None}
            for name, values in asked.items():
                if (value := values[index]) is not None:
                    entry[_kind(name, value, chosen=self._prompt_column is not None)] = value
            try:
                if self._template and "messages" in entry:
                    entry["chat_template_kwargs"] = {**self._template, **entry.get("chat_template_kwargs", {})}
                raw = json.dumps(entry).encode()
                if entry.get("seed") is None:
                    entry["seed"] = self._seed_of(raw, seen[raw])
                    seen[raw] += 1
                    raw = json.dumps(entry).encode()
            except (TypeError, ValueError) as error:
                rows[index] = {"error": f"cannot be used: {error}"}
                continue
            lines.append(Line(index, index + 1, raw))
        return lines, rows

    def _seed_of(self, raw: bytes, before: int) -> int:
        of_row = int.from_bytes(blake2b(raw, digest_size=8).digest(), "big")
        return (self._seed + of_row + before) % 2**63

    def _answer(self, lines: list[Line], rows: dict[int, dict[str, Any]]) -> None:
        """Fill ``rows``. After an engine's death rows are answered one by one, so that it is known which does it."""
        deaths, alone = 0, False
        blame: Counter[int] = Counter()
        while left := [line for line in lines if line.index not in rows]:
            llm, before = self._engine(), len(rows)
            try:
                self._run(llm, left, rows, alone)
            except EngineError as error:
                self._end(llm)
                deaths = 1 if len(rows) > before else deaths + 1
                if deaths >= DEATHS:
                    raise
                suspect = next((line.index for line in left if line.index not in rows), None)
                if alone and suspect is not None:
                    blame[suspect] += 1
                    if blame[suspect] == ALONE:
                        rows[suspect] = {"error": f"{ALONE} engines died over this row while it was alone: {error}"}
                alone = True

    def _run(self, llm: LLM, lines: list[Line], rows: dict[int, dict[str, Any]], alone: bool) -> None:
        tokenizer, info = llm.tokenizer, llm.info
        most, size = info.max_model_len, info.vocab_size
        parser = JobParser(tokenizer, sampling=self._sampling, stop=self._stop, max_model_len=most, vocab_size=size)
        window = 1 if alone else max(2, 4 * info.max_num_seqs)
        Batch(llm.client, tokenizer, _Rows(rows), window).run(lines, parser, together=1 if alone else _TOGETHER)

    def _engine(self) -> LLM:
        with self._lock:
            if self._llm is None:
                self._llm = LLM(self._model, self._tp, **self._settings)
            return self._llm

    def _end(self, llm: LLM) -> None:
        with self._lock:
            if self._llm is llm:
                self._llm = None
        llm.close()


class _Rows:
    """Where a run's rows go (``client.batch.Kept``)."""

    def __init__(self, rows: dict[int, dict[str, Any]]) -> None:
        self._rows = rows

    def has(self, line: Line) -> bool:
        return False

    def add(self, line: Line, row: Mapping[str, Any], cached: int = 0) -> None:
        found = {name: value for name, value in row.items() if name != "id"}
        if "error" in found:
            said = str(found["error"]).removeprefix(f"{line.named}: ")
            found["error"] = f"the row{said.removeprefix(line.named)}" if said.startswith(f"{line.named} ") else said
        self._rows[line.index] = found


def _kind(name: str, value: Any, *, chosen: bool) -> str:
    """Whether a value is a prompt or a conversation; of a column that the user chose its own form tells."""
    if not chosen:
        return name
    return "messages" if isinstance(value, list) else "prompt"
