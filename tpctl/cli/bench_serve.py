"""``tpctl bench serve``."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tpctl.cli.console import note, print_json, status
from tpctl.cli.options import grouped
from tpctl.cli.serve import API_KEY, printable_key
from tpctl.errors import OutputError, UsageError, shown
from tpctl.json_file import TwoMeanings, one_meaning

if TYPE_CHECKING:
    from tpctl.bench.serving import Measured, Prompts, Settings

OTHERS_KEY = "OPENAI_API_KEY"
NUM_PROMPTS = 100

_OWN = ("model", "stream", "prompt", "messages", "n")
"""Fields that --body does not set: others say them, or what is measured would be something else."""


class EndpointKind(StrEnum):
    completions = "completions"
    chat = "chat"


class Workload(StrEnum):
    random = "random"
    nano = "nano"
    short = "short"
    prefix = "prefix"
    long = "long"
    even = "even"


@dataclass(frozen=True)
class WorkloadOptions:
    """What is asked."""

    workload: Annotated[
        Workload,
        typer.Option(help="random: prompts of random words; the others: as many and as long as bench throughput's."),
    ] = Workload.random
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSONL with prompt or messages instead; other fields of a line are sent too."
        ),
    ] = None
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help=f"Requests at each rate. Default: all of a file, else {NUM_PROMPTS}.")
    ] = None
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of random prompts.")] = 512
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of answers. Default: 128, or a line's max_tokens.")
    ] = None
    length_spread: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="0.5: random lengths are from half to one and a half times that.")
    ] = 0.0
    prefix_tokens: Annotated[int, typer.Option(min=0, help="Tokens before those, which prompts have in common.")] = 0
    prefixes: Annotated[int, typer.Option(min=1, help="How many different such beginnings there are.")] = 1
    token_ids: Annotated[
        bool, typer.Option("--token-ids", help="Send prompts as random token ids, so that lengths are exact.")
    ] = False
    ignore_eos: Annotated[
        bool | None, typer.Option("--ignore-eos/--no-ignore-eos", help="Default: not for a file's prompts.")
    ] = None
    body: Annotated[
        str, typer.Option(metavar="JSON", help="Fields for every request; null leaves one out. Default: temperature 0.")
    ] = "{}"
    seed: Annotated[int, typer.Option(min=0, help="Makes prompts and arrivals repeatable.")] = 0

    def fields(self) -> dict[str, Any]:
        """Those of ``--body``. Raises ``UsageError``."""
        try:
            value = json.loads(self.body, object_pairs_hook=one_meaning)
        except TwoMeanings as error:
            raise UsageError(f"--body: {error}") from None
        except (ValueError, RecursionError):
            value = self.body
        if not isinstance(value, dict):
            raise UsageError(f"--body is {shown(value)}, but must be a JSON object")
        if own := [name for name in _OWN if name in value]:
            raise UsageError(f"--body has {own[0]}, which is not for it to set; leave it out")
        return value

    def defaults(self) -> dict[str, Any]:
        """Fields that the prompts' own replace."""
        ignore = self.prompts is None if self.ignore_eos is None else self.ignore_eos
        most = {} if self.output_tokens is None else {"max_tokens": self.output_tokens}
        return {"temperature": 0.0, **({"ignore_eos": True} if ignore else {}), **most}

    def maker(self, *, chat: bool) -> Prompts:
        """Raises ``UsageError`` where options contradict each other, ``SourceError`` where a file cannot be read."""
        from tpctl.bench.prompts import Shape, file_prompts, named_prompts, random_prompts

        self._check()
        if self.prompts is not None:
            lines = file_prompts(self.prompts, self.num_prompts, chat=chat)
            return lambda seed, count: lines[:count]
        if (name := self.workload) is not Workload.random:
            named_prompts(name, self.num_prompts, 0, ids=True)
            return lambda seed, count: named_prompts(name, count or self.num_prompts, seed, ids=self.token_ids)
        shape = Shape(
            self.prompt_tokens,
            self.output_tokens or 128,
            self.length_spread,
            self.prefix_tokens,
            self.prefixes,
            self.token_ids,
        )
        return lambda seed, count: random_prompts(count or self.num_prompts or NUM_PROMPTS, shape, seed)

    def _check(self) -> None:
        """Raises ``UsageError`` where an option says how prompts are made that are not made."""
        named = self.workload is not Workload.random
        if self.prompts is None and not named:
            return
        unused = ["prompt_tokens", "length_spread", "prefix_tokens", "prefixes"]
        unused += ["token_ids", "workload"] if self.prompts is not None else ["output_tokens"]
        given = {one.name: getattr(self, one.name) != one.default for one in fields(self)}
        for name in unused:
            if given[name]:
                prompts = f"--prompts {self.prompts}" if self.prompts is not None else f"--workload {self.workload}"
                raise UsageError(f"--{name.replace('_', '-')} says nothing of the prompts of {prompts}; leave one out")


@dataclass(frozen=True)
class LoadOptions:
    """How requests come."""

    rate: Annotated[
        str,
        typer.Option(
            metavar="R,...",
            help="Requests a second on the average of a run, one run each, e.g. 1,2,4,inf; inf: all at once.",
        ),
    ] = "inf"
    burstiness: Annotated[
        float, typer.Option(help="1: a Poisson process; below: in bursts; above: evener; inf: evenly.")
    ] = 1.0
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests under way at once; others wait.")] = None
    warmup: Annotated[int, typer.Option(min=1, help="Requests that are sent before, one after the other.")] = 1
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="That an answer may take.")] = 600.0
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="Limit of goodput, of ttft, tpot or e2e, e.g. ttft:500. Repeatable."),
    ] = None

    def rates(self) -> list[float]:
        """Raises ``UsageError``."""
        try:
            found = [float(one) for one in self.rate.split(",")]
        except ValueError:
            found = [0.0]
        if not all(one > 0 for one in found):
            raise UsageError(f"--rate {self.rate} is no list of numbers above 0, as 1,2.5,inf is")
        return found

    def limits(self) -> dict[str, float]:
        """Raises ``UsageError``."""
        from tpctl.bench.latencies import LIMITS

        found = {}
        for one in self.slo or ():
            name, _, text = one.partition(":")
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if name not in LIMITS or not 0 < value < math.inf:
                raise UsageError(
                    f"--slo {one} is no limit such as ttft:500; known: {', '.join(LIMITS)}, in milliseconds"
                )
            found[name] = value
        return found


@grouped
def bench_serve(
    url: Annotated[str, typer.Option(help="The server's address, with or without /v1.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help=f"Default: {API_KEY}, else {OTHERS_KEY}, where others do not see it."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="As the server calls it. Default: the first of /v1/models.")] = None,
    endpoint: Annotated[EndpointKind, typer.Option(help="/v1/completions or /v1/chat/completions.")] = (
        EndpointKind.completions
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save that JSON, with each request's figures.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    *,
    workload: WorkloadOptions,
    load: LoadOptions,
) -> None:
    """Measure a server with OpenAI's interface, tpctl's or another, from outside.

    Answers are streamed. TTFT: time to first token; TPOT: time per token after it; ITL: time between two chunks; E2E:
    time to the last token. They are defined as in `vllm bench serve`, so that figures compare.
    """
    from tpctl.bench.serving import PATHS, measure
    from tpctl.cli.bench_serve_report import print_runs, warmed
    from tpctl.serve.sockets import raise_file_limit

    settings = _settings(url, api_key, model, endpoint, workload, load)
    prompts, target = workload.maker(chat=endpoint is EndpointKind.chat), _target(output, force=force)
    found: list[Measured] = []

    def report(*, detail: bool) -> dict[str, Any]:
        from tpctl.bench.measure import machine

        runs = [{**one.summary.to_dict(), **({"requests": one.rows} if detail else {})} for one in found]
        named = {"benchmark": "serve", "model": found[0].model, "url": str(settings.address)}
        asked = {"endpoint": settings.endpoint, **_plain(workload), **_plain(load)}
        return {**named, "runs": runs, "machine": machine(), "settings": asked}

    def done(one: Measured) -> None:
        found.append(one)
        if target is not None:  # as each rate is done, so that a Ctrl-C loses none
            _save(target, report(detail=True))

    raise_file_limit()
    asyncio.run(measure(settings, prompts, status, done, warmed))
    if as_json:
        print_json(report(detail=False))
    else:
        print_runs(found, f"{settings.address}{PATHS[settings.endpoint]}")
    if target is not None:
        note(f"saved as {target}")


def _settings(
    url: str,
    api_key: str | None,
    model: str | None,
    endpoint: EndpointKind,
    workload: WorkloadOptions,
    load: LoadOptions,
) -> Settings:
    from tpctl.bench.endpoint import Address
    from tpctl.bench.serving import Settings

    key = os.environ.get(API_KEY) or os.environ.get(OTHERS_KEY) or None if api_key is None else api_key
    if not load.burstiness > 0:
        raise UsageError(f"--burstiness {load.burstiness:g} is not above 0; 1 is a Poisson process")
    if workload.token_ids and endpoint is EndpointKind.chat:
        raise UsageError("--token-ids are prompts of --endpoint completions; leave them out, or use that")
    return Settings(
        Address.of(url),
        printable_key(key, f"{API_KEY}, {OTHERS_KEY} or --api-key"),
        model,
        endpoint.value,
        workload.defaults(),
        workload.fields(),
        load.rates(),
        load.burstiness,
        load.max_concurrency,
        load.warmup,
        workload.seed,
        load.timeout,
        load.limits(),
    )


def _target(output: Path | None, *, force: bool) -> Path | None:
    """The file to save to. Raises ``OutputError`` where it may not, or cannot, be written."""
    from tpctl.checkpoint.outputs import resolved
    from tpctl.client.resume import check_target

    if output is None:
        return None
    target = resolved(output)
    if target.is_dir() or not target.parent.is_dir():
        what = "is a folder" if target.is_dir() else "is in a folder that does not exist"
        raise OutputError(f"{output} {what}; name another file with -o")
    check_target(target, force=force)
    return target


def _save(target: Path, report: Mapping[str, Any]) -> None:
    from tpctl.checkpoint.outputs import write_whole

    try:
        write_whole(target, (json.dumps(report, indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from None


def _plain(options: Any) -> dict[str, Any]:
    """Options as JSON has them."""
    return {
        name: "inf" if value == math.inf else str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }
