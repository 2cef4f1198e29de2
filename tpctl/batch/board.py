"""The coordinator's side of the folder: what is offered, who has taken it, what goes back, what is done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from tpctl.batch.folder import DEATHS, JobFolder, Span, load, log_lines, move, names, open_log, spans_in
from tpctl.batch.formats.place import Formats, Part, Sink, read_checked
from tpctl.batch.leases import offer
from tpctl.batch.prefixes import order_of
from tpctl.batch.rows import KeptRow, Sums, keep_rows, kept_rows, put_together, sums_beside, sums_of
from tpctl.client.disk import writing
from tpctl.client.jobs import unanswered
from tpctl.errors import OutputError, counted

PIECES = 8
"""Spans that a part which engines died over is cut into, again and again, until the deadly line is alone."""


class Board:
    """What of the batch is done, offered and taken. One process at a time has one.

    Attributes:
        sums: of all parts that are done.
        done: their numbers.
    """

    def __init__(self, folder: JobFolder, formats: Formats) -> None:
        """Read what an earlier run left.

        Raises:
            OutputError: the folder cannot be written to, or a part that is done is not what was put there.
        """
        self._folder = folder
        self._source, self._sink = formats.source, formats.sink
        self._parts: dict[int, Part] = {}  # of which lines are offered or taken
        self.sums = Sums()
        self._sums_of: dict[int, Sums] = {}
        self.done = set(folder.parts())
        told = {entry["part"]: entry for entry in log_lines(folder.log)}
        for number in self.done:
            self._sums_of[number] = self._read(number, told.get(number))
            self.sums.add(self._sums_of[number])
        self._log: IO[bytes] = open_log(folder.log)
        for name, span, _ in [*spans_in(folder.offers), *spans_in(folder.leases)]:
            place = folder.offers if "@" not in name else folder.leases
            if span.part not in self.done and (value := load(place / name)) is not None:
                self._parts[span.part] = Part.from_json(value)
        leases = {name for name, _, _ in spans_in(folder.leases)}
        for name, span, _ in spans_in(folder.work):
            if name not in leases and span.part not in self.done:
                self._save(name)
        places = (folder.offers, folder.leases, folder.work, folder.kept, folder.finished)
        for number in set().union(*map(_numbers, places)) & self.done:
            self._tidy(number)

    def close(self) -> None:
        with suppress(OSError):  # a full disk; the sums are read from the parts next time
            self._log.close()

    @property
    def offered(self) -> int:
        """Spans that nobody has taken."""
        return sum(1 for _ in spans_in(self._folder.offers))

    def _part(self, number: int) -> Path:
        return self._folder.part(number, self._sink.suffix)

    def _read(self, number: int, told: Mapping[str, Any] | None) -> Sums:
        """What a part that is done comes to: as the log has it, or counted anew where its file is another one.

        Raises:
            OutputError: it is damaged.
        """
        path = self._part(number)
        with writing(path):
            size = path.stat().st_size
        if told is not None and told.get("bytes", size) == size:
            return Sums(**told["sums"])
        advice = "bring it back, or remove it to have its rows answered again"
        try:
            found = sums_of(self._sink.decode(path))
        except (ValueError, KeyError, TypeError):  # also pyarrow's errors
            raise OutputError(f"{path} is damaged; {advice}") from None
        if told is not None and found.rows != told["sums"]["rows"]:
            raise OutputError(f"{path} has {counted(found.rows, 'row')}, but had {told['sums']['rows']}; {advice}")
        return found

    def under_way(self, part: Part) -> bool:
        return part.number in self._parts

    @property
    def idle(self) -> bool:
        """Whether nothing is offered and nothing taken."""
        return not self._parts

    def errors_of(self, number: int) -> int:
        return self._sums_of[number].errors

    def offer(self, part: Part) -> None:
        """Let replicas take a part."""
        offer(self._folder, part.spans(), part)
        self._parts[part.number] = part

    def reopen(self, part: Part) -> None:
        """Have the error rows of a part that is done tried again; it stays until the new one takes its place."""
        rows = dict(enumerate(self._sink.decode(self._part(part.number))))
        good = {place: KeptRow(row) for place, row in rows.items() if "error" not in row}
        if good:  # parts do not say which of their rows had how much cached; the first one counts for all
            place = next(iter(good))
            good[place] = KeptRow(good[place].row, self._sums_of[part.number].cached_tokens)
        keep_rows(self._folder.kept / f"{part.number:05d}.good", good)
        self.done.discard(part.number)
        self.sums.less(self._sums_of[part.number])
        self.offer(part)

    def drop_errors(self) -> None:
        """Have error rows tried again that replicas left in parts which are not done."""
        for number in _numbers(self._folder.kept) - self.done:
            good = {at: kept for at, kept in kept_rows(self._folder, number).items() if "error" not in kept.row}
            together = self._folder.kept / f"{number:05d}.good"
            keep_rows(together, good)
            for name in names(self._folder.kept):
                if name.startswith(f"{number:05d}.") and name != together.name:
                    (self._folder.kept / name).unlink(missing_ok=True)

    def collect(self) -> int:
        """Take up what replicas have handed in; how many spans."""
        count = 0
        pieces: dict[int, Part] = {}
        for name, span, _ in spans_in(self._folder.finished):
            count += 1
            handed = self._folder.finished / name
            beside = sums_beside(handed)
            part = self._parts.get(span.part)
            if part is None:  # another one was faster
                self._tidy(span.part)
            elif span.count == part.rows:
                self._publish(part, handed, load(beside))
            else:
                kept = self._folder.kept / f"{name}.rows"
                move(beside, sums_beside(kept))
                move(handed, kept)
                (self._folder.work / name).unlink(missing_ok=True)
                self._remove(name)
                pieces[part.number] = part
            beside.unlink(missing_ok=True)
        for part in pieces.values():
            if part.number in self._parts:
                self._settle(part)
        return count

    def offer_lost(self) -> None:
        """Offer parts again that are under way and of which no file is there: a coordinator that was taken over, and
        did not know it yet, has removed them."""
        folder = self._folder
        # In this order, in which files move, so that none is missed that moves meanwhile.
        places = (folder.offers, folder.leases, folder.finished)
        there = {span.part for place in places for _, span, _ in spans_in(place)}
        for number in set(self._parts) - there:
            self._settle(self._parts[number])

    def holders(self) -> dict[str, list[str]]:
        """The leases by the replica that holds them."""
        found: dict[str, list[str]] = {}
        for name, span, holder in spans_in(self._folder.leases):
            if span.part not in self._parts:  # its part is done
                self._remove(name)
                continue
            found.setdefault(holder, []).append(name)
        return found

    def give_back(self, leases: Iterable[str], *, died: bool) -> None:
        """Take leases from a replica that is gone, and offer what it did not answer.

        Args:
            died: whether one of their lines may be the reason.
        """
        for name in leases:
            parsed = Span.parse(name)
            if parsed is None or (part := self._parts.get(parsed[0].part)) is None:
                continue
            span = parsed[0]
            self._save(name)
            again = replace(span, deaths=span.deaths + died)
            if died and again.alone:
                self._narrow(again, part)
                self._remove(name)
                self._settle(part)
            else:
                move(self._folder.leases / name, self._folder.offers / again.name)

    def _save(self, name: str) -> None:
        """Keep the rows of a replica that is gone for who takes its lines next."""
        move(self._folder.work / name, self._folder.kept / f"{name}.rows")

    def _narrow(self, span: Span, part: Part) -> None:
        """Offer what is left of a span in pieces.

        A line that two engines died over while it was alone becomes an error row: that is one more than chance would
        often blame it for.
        """
        with self._source.open() as reader:
            lines = read_checked(reader, part)
        order = order_of(lines, part.sharing)
        rows = kept_rows(self._folder, part.number)
        left = [at for at in range(span.first, span.end) if order[at] not in rows]
        if span.count == 1 and left and span.deaths > DEATHS:
            place = order[left[0]]
            error = f"at least {DEATHS} engines died or hung while they answered it"
            row = unanswered(self._source.form, lines[place], error)
            keep_rows(self._folder.kept / f"{span.name}.rows", {place: KeptRow(row)})
            return
        size = -(-len(left) // PIECES)
        pieces = [left[start : start + size] for start in range(0, len(left), size)] if left else []
        offer(self._folder, [_piece(span, piece) for piece in pieces], part)

    def _settle(self, part: Part) -> None:
        """Once no span of a part is offered or taken: put it together, or offer what is missing."""
        for place in (self._folder.offers, self._folder.leases):
            if any(span.part == part.number for _, span, _ in spans_in(place)):
                return
        whole = self._folder.finished / f"{part.number:05d}.whole"

        def encode(out: IO[bytes], rows: Iterable[bytes]) -> None:
            self._sink.encode(out, part.index, rows)

        sums = put_together(self._folder, part.number, part.rows, whole, encode)
        if sums is None:
            self.offer(part)
        else:
            self._publish(part, whole, sums.to_dict())

    def _publish(self, part: Part, file: Path, told: dict[str, Any] | None) -> None:
        """Give a file its place; ``told``: what its rows come to.

        A coordinator that was taken over, and does not know it yet, may be faster at any moment: then the part is
        there, or is offered again.
        """
        number, target = part.number, self._part(part.number)
        try:
            size = file.stat().st_size
            sums = Sums(**told) if told else sums_of(self._sink.decode(file))
        except FileNotFoundError:
            if not target.exists():
                self._settle(part)
                return
            size = target.stat().st_size
            sums = sums_of(self._sink.decode(target))
        with writing(self._folder.log):
            self._log.write(json.dumps({"part": number, "bytes": size, "sums": sums.to_dict()}).encode() + b"\n")
            self._log.flush()
        if not move(file, target) and not target.exists():
            self._settle(part)
            return
        self._sums_of[number] = sums
        self.sums.add(sums)
        self.done.add(number)
        del self._parts[number]
        self._tidy(number)

    def _tidy(self, number: int) -> None:
        """Remove what else there is of a part that is done."""
        folder = self._folder
        for place in (folder.leases, folder.offers, folder.kept, folder.work, folder.finished):
            for name in names(place):
                if name.startswith((f"{number:05d}.", f".{number:05d}.")):
                    (place / name).unlink(missing_ok=True)

    def _remove(self, name: str) -> None:
        (self._folder.leases / name).unlink(missing_ok=True)


def _numbers(place: Path) -> set[int]:
    """The parts that files are of, whole ones and those that somebody was writing."""
    found = {name.lstrip(".").partition(".")[0] for name in names(place)}
    return {int(number) for number in found if number.isdigit()}


def _piece(span: Span, left: list[int]) -> Span:
    """The span of some lines of another one; one line begins to count its deaths anew."""
    first, count = left[0], left[-1] + 1 - left[0]
    deaths = DEATHS - 1 if count == 1 < span.count else span.deaths
    return replace(span, first=first, count=count, deaths=deaths)


def assemble(folder: JobFolder, sink: Sink, target: Path, count: int, check: Callable[[], object]) -> None:
    """Put the first ``count`` parts together to one file, which appears whole.

    Args:
        check: raises if the target may not be replaced any more.

    Raises:
        OutputError: it cannot be written.
    """
    from shutil import copymode

    temporary = target.with_name(f".{target.name}.publishing")
    with writing(target):
        try:
            with temporary.open("wb") as out:
                sink.join(out, (folder.part(number, sink.suffix) for number in range(count)))
                out.flush()
                os.fsync(out.fileno())
            check()
            if target.exists():
                copymode(target, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
