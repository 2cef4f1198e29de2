"""``tpctl serve``: a model behind OpenAI's interface."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from tpctl.cli.console import byte_progress, note
from tpctl.cli.engine import describe, engine_args, lend_ranks, prepare, say_context, say_nodes
from tpctl.cli.log import Log
from tpctl.cli.options import (
    CHAT_CPU_TOKENS,
    MODEL_HELP,
    DistributionOptions,
    EngineOptions,
    NodeOptions,
    TemplateOptions,
    grouped,
)
from tpctl.cli.signals import come
from tpctl.cli.template import TemplateAtHand, look_ahead
from tpctl.cli.units import parse_bytes
from tpctl.errors import UsageError

if TYPE_CHECKING:
    from tpctl.client.engine_client import EngineClient
    from tpctl.launch.nodes import Nodes
    from tpctl.serve.run import ServeSettings
    from tpctl.wire.report import EngineInfo
    from tpctl.wire.settings import EngineConfig

API_KEY = "TPCTL_API_KEY"
_NEEDED = ("starlette", "uvicorn", "msgspec", "prometheus_client")
_OPENAI_DEFAULTS = {"temperature": 1.0, "top_p": 1.0}


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, and what it takes."""

    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all of this host's.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help=f"What clients must send. Repeatable. Default: {API_KEY}, where others do not see it."
        ),
    ] = None
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Web pages that may use it besides its own, like http://localhost:3000; *: all. Repeatable.",
        ),
    ] = None
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What clients call the model. Repeatable. Default: MODEL."),
    ] = None
    replicas: Annotated[
        int, typer.Option(min=1, max=64, help="Engines, each on its own --tp GPUs or its share of the cores.")
    ] = 1
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait, besides those computed together; others get a 429.")
    ] = 1024
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Longest body of a request.")] = "16MiB"
    max_memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="What all requests may hold, from bodies to answers not read yet; others get a 429."
        ),
    ] = "2GiB"
    drain: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.0, help="In which requests may end after SIGTERM or Ctrl-C.")
    ] = 30.0
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line on stderr for each request: status, seconds, tokens.")
    ] = False
    stream_interval: Annotated[
        int,
        typer.Option(
            min=1,
            max=1024,
            help="Tokens of an answer in a chunk of its stream; its first comes at once. More than one cost the server "
            "less where there are hundreds of streams.",
        ),
    ] = 1

    def origins(self) -> tuple[str, ...]:
        """Raises ``UsageError`` if one is none."""
        from tpctl.serve.origins import check_origin

        return tuple(check_origin(one) for one in self.allowed_origin or ())

    def keys(self) -> tuple[str, ...]:
        """Raises ``UsageError`` if one is none that a header can hold: an empty one keeps nobody out."""
        if self.api_key:
            return tuple(_header_key(key, "--api-key") for key in self.api_key)
        if (key := os.environ.get(API_KEY)) is None:
            return ()
        if not key:
            raise UsageError(f"{API_KEY} is empty; give it a value, or unset it")
        return (_header_key(key, API_KEY),)


def printable_key(key: str | None, source: str) -> str | None:
    """``key`` itself. Raises ``UsageError`` if a header cannot hold it; ``source``: what it came by."""
    return None if key is None else _header_key(key, source)


def _header_key(key: str, source: str) -> str:
    if not (key.isascii() and key.isprintable() and key.strip() == key and key):
        raise UsageError(f"the API key ({source}) must be of printable ASCII, and not empty")
    return key


@grouped
def serve(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "demo",
    *,
    server: ServerOptions,
    node: NodeOptions,
    engine: EngineOptions,
    sampling: DistributionOptions,
    template: TemplateOptions,
) -> None:
    """Serve a model with OpenAI's interface. It is downloaded and sharded first if need be.

    /v1/chat/completions, /v1/completions, /v1/responses, /v1/models, /tokenize, /detokenize, /health and /metrics. What
    a request does not say is as the options here have it, else as the model's generation_config.json recommends, else
    as OpenAI's interface has it. The first SIGTERM or Ctrl-C lets requests end, the second one does not wait.

    A model that fits no host runs on several: the same command on each, with --nnodes, --node-rank and --rdzv-endpoint.
    The first of them listens.
    """
    nodes = node.nodes()
    if nodes.count > 1 and server.replicas > 1:
        raise UsageError(f"--nnodes {nodes.count} is for one engine, and --replicas {server.replicas} asks for more")
    if nodes.rank > 0:
        lend_ranks(prepare(model, engine, cpu_tokens=CHAT_CPU_TOKENS, nodes=nodes), nodes)
        return
    check_installed()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads that tokenize are the server's own
    sampling.check()
    checked = _checked(server)  # before anything is loaded
    with ExitStack() as stack:
        from tpctl.serve.sockets import listen, url_of

        log = stack.enter_context(Log())
        sock = stack.enter_context(listen(server.host, server.port))
        at_hand = TemplateAtHand(template)
        config = _configured(model, engine, server.replicas, at_hand, nodes)
        engines = [stack.enter_context(one) for one in _started(config, engine, server.replicas, nodes)]
        say_nodes(config, nodes)
        settings = _settings(model, server, checked, sampling, config, at_hand)
        from tpctl.serve.run import serve as run

        def ready(info: EngineInfo) -> None:
            say_context(info)
            many = f"{server.replicas} engines, each " if server.replicas > 1 else ""
            log.note(f"{model} is ready ({many}{describe(info)})")
            log.note(f"Uvicorn running on {url_of(sock)} (Press CTRL+C to quit)")

        at_once = config.max_num_seqs * server.replicas
        tokenizer = at_hand.tokenizer(config.text_dir)
        early = run(engines, tokenizer, sock, settings, at_once=at_once, ready=ready, note=log.note, signalled=come)
    if early is not None:
        note(f"tpctl: interrupted before {model} was ready")
        raise typer.Exit(128 + early)


def check_installed() -> None:
    """Raise ``UsageError`` if a package is missing that only this command needs."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UsageError(f"tpctl serve needs {', '.join(missing)}; pip install 'tpctl[serve]'")


def _configured(
    model: str, engine: EngineOptions, replicas: int, at_hand: TemplateAtHand, nodes: Nodes
) -> EngineConfig:
    from tpctl.client import prepare as client

    args = engine_args(engine, cpu_tokens=CHAT_CPU_TOKENS)
    args = replace(args, engines_on_host=replicas, nodes=nodes, late_launch=True)
    return client.prepare(
        model, args, look=lambda source: look_ahead(at_hand, source, needed=False), progress=byte_progress
    )


def _started(config: EngineConfig, engine: EngineOptions, replicas: int, nodes: Nodes) -> Iterator[EngineClient]:
    """Engines whose workers have their GPUs, or their share of the cores, to themselves."""
    from tpctl.client.engine_client import EngineClient
    from tpctl.launch.places import cores_of, places

    if replicas == 1:
        yield EngineClient(config, nodes=nodes)
        return
    for number, gpus in enumerate(places(replicas, config.tp_size, config.device, engine.kv_cache_memory is not None)):
        cores = None if gpus is not None else cores_of(number, replicas)
        env = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
        before = os.sched_getaffinity(0) if cores is not None else set()
        if cores is not None:
            os.sched_setaffinity(0, cores)  # of this thread, and of what it starts
        try:
            yield EngineClient(config, env=env)
        finally:
            if cores is not None:
                os.sched_setaffinity(0, before)


class _Checked(NamedTuple):
    """What options of a server say, once that was looked at; sizes in bytes."""

    keys: tuple[str, ...]
    origins: tuple[str, ...]
    max_body: int
    max_memory: int


def _checked(server: ServerOptions) -> _Checked:
    """Raises ``UsageError``."""
    from tpctl.serve.memory import LEAST_MEMORY

    keys, origins, max_body = server.keys(), server.origins(), parse_bytes(server.max_body, "MiB")
    if (max_memory := parse_bytes(server.max_memory, "GiB")) < LEAST_MEMORY:
        said = f"--max-memory is {server.max_memory}, but at least {LEAST_MEMORY >> 20}MiB are needed"
        raise UsageError(f"{said} for a few requests")
    return _Checked(keys, origins, max_body, max_memory)


def _settings(
    model: str,
    server: ServerOptions,
    checked: _Checked,
    sampling: DistributionOptions,
    config: EngineConfig,
    at_hand: TemplateAtHand,
) -> ServeSettings:
    from tpctl.client.conversation import recommended_sampling
    from tpctl.serve.run import ServeSettings

    defaults = recommended_sampling(config.text_dir, sampling.given(), at_hand.shown, _OPENAI_DEFAULTS)
    names = tuple(server.served_model_name or (model,))
    return ServeSettings(
        names,
        defaults,
        checked.keys,
        max_body=checked.max_body,
        max_memory=checked.max_memory,
        max_waiting=server.max_waiting,
        drain=server.drain,
        interval=server.stream_interval,
        origins=checked.origins,
        host=server.host,
        access_log=server.access_log,
    )
