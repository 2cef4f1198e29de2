"""Whether what ended with exit code 0 is right: held against the source's bytes, safetensors, and transformers."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.described import described, mlps_by_transformers
from tests.fuzz.case import Case, Outcome
from tests.fuzz.judge import Fault

BRIEF = 2.0
"""Seconds: what took a command longer is not done once more by an oracle."""


def check(case: Case, outcomes: list[Outcome], work: Path) -> list[Fault]:
    """Faults of the results of a case's commands, which lie in ``work``."""
    if any(change.kind in ("fifo", "zero", "sparse") for change in case.changes):
        return []  # what reads such a file here has no limits
    good = [
        outcome for outcome in outcomes if outcome.code == 0 and outcome.failure is None and outcome.seconds < BRIEF
    ]
    found: list[Fault] = []
    for outcome in good if case.target != "options" else []:
        name = outcome.command[0]
        if name == "merge":
            found += _merged(case, work)
        if (
            name in ("shard", "plan", "chat")
            and case.target in ("config", "index", "header")
            and "--ranks" not in outcome.command
        ):
            found += _config(work / "model", name)
        if name in ("shard", "chat") and case.target == "header":
            found += _headers(work / "model", name)
        if name in ("chat", "batch") and case.target in ("tokenizer", "template"):
            found += _tokens(work / "model", outcome)
        if name == "chat" and case.target == "config":
            found += _sampling(work / "model", outcome)
    if len(outcomes) > 1 and outcomes[0].command[0] == "shard" and outcomes[0].code == 0 and outcomes[-1].code == 1:
        said = f"`{' '.join(outcomes[-1].command)}` after a shard that succeeded: {outcomes[-1].stderr[:300]}"
        found.append(Fault("shards that do not hold", outcomes[-1].command[0], said))
    if outcomes and outcomes[-1].command[0] == "batch" and case.target != "options" and outcomes[-1].failure is None:
        found += _rows(case, outcomes[-1], work)
    if outcomes and case.target == "options" and outcomes[-1].code == 0:
        found += _options(outcomes[-1])
    return found


def _merged(case: Case, work: Path) -> list[Fault]:
    """``merge`` gives back the source byte for byte."""
    wrong = []
    for source in sorted((work / "model").glob("model*.safetensors*")):
        there = work / "merged" / source.name
        if not source.is_file() or (case.target == "index" and source.suffix != ".json" and not there.exists()):
            continue  # an index may leave files out
        if not there.is_file() or there.read_bytes() != source.read_bytes():
            wrong.append(source.name)
    return [Fault("merged files differ", "merge", ", ".join(wrong))] if wrong else []


def _headers(model: Path, name: str) -> list[Fault]:
    """The reference implementation reads what tpctl read."""
    from safetensors import SafetensorError, deserialize

    for path in sorted(model.glob("*.safetensors")):
        try:
            deserialize(path.read_bytes())
        except SafetensorError as error:
            return [Fault("safetensors refuses the file", name, f"{path.name}: {error}")]
    return []


def _config(model: Path, name: str) -> list[Fault]:
    """Every number that tpctl reads from a config is the one that transformers reads, where that takes it."""
    from tpctl.arch.config import ModelConfig
    from tpctl.errors import TpctlError

    try:
        config = ModelConfig.load(model)
    except TpctlError as error:
        return [Fault("a config that is refused when read again", name, str(error))]
    if config.blueprint.why_not_run() is not None:  # of what is only cut, sizes are read, which the headers show
        return []
    ours = described(config)
    theirs = _quietly(lambda: read_by_transformers(model, ours))
    if theirs is None:
        return []
    return [
        Fault("config unlike transformers", f"{key}", f"{ours.model_type}: {key} is {mine!r} here, {their!r} there")
        for key, (mine, their) in theirs.items()
        if mine != their
    ]


def read_by_transformers(model: Path, ours: Any) -> dict[str, tuple[Any, Any]]:
    from transformers import CONFIG_MAPPING

    raw = json.loads((model / "config.json").read_text(encoding="utf-8-sig"))
    config = CONFIG_MAPPING[ours.model_type].from_dict(raw)
    heads = config.num_attention_heads
    found = {
        "hidden_size": (ours.hidden_size, config.hidden_size),
        "num_layers": (ours.num_layers, config.num_hidden_layers),
        "num_heads": (ours.num_heads, heads),
        "num_kv_heads": (ours.num_kv_heads, config.num_key_value_heads),
        "head_dim": (ours.head_dim, getattr(config, "head_dim", None) or config.hidden_size // heads),
        "mlps": (ours.mlps, mlps_by_transformers(config)),
        "vocab_size": (ours.vocab_size, config.vocab_size),
        "rms_norm_eps": (ours.rms_norm_eps, config.rms_norm_eps),
        "tie_word_embeddings": (ours.tie_word_embeddings, bool(config.tie_word_embeddings)),
    }
    if hasattr(config, "kv_lora_rank"):  # latent attention has neither, whatever the fields say
        del found["num_kv_heads"], found["head_dim"]
    if ours.model_type in ("llama", "qwen3"):
        found["attention_bias"] = (ours.o_bias, bool(config.attention_bias))
    if ours.model_type == "llama":
        found["mlp_bias"] = (ours.mlp_bias, bool(config.mlp_bias))
    found["windows"] = (ours.windows, _windows(config, ours))
    rope = config.rope_parameters
    if isinstance(rope.get("full_attention"), dict):  # Gemma 3's; here the first layer's is held against ours
        rope = rope[config.layer_types[0]]
    theta = rope.get("rope_theta")
    found["rope_type"] = (ours.rope.kind, rope.get("rope_type", "default"))
    found["rope_theta"] = (ours.rope.theta, None if theta is None else float(theta))
    found["rotary_dim"] = (ours.rope.rotary_dim, int(ours.head_dim * (rope.get("partial_rotary_factor") or 1.0)))
    for key in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "short_factor",
        "long_factor",
        "beta_fast",
        "beta_slow",
    ):
        if ours.rope.kind != "default" and (key in ours.rope.params or key in rope):
            found[f"rope {key}"] = (ours.rope.params.get(key), rope.get(key))
    return found


def _windows(config: Any, ours: Any) -> tuple[int | None, ...]:
    """Each attention layer's sliding window as the model class of transformers applies it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if ours.model_type in ("llama", "glm4_moe"):
        return (None,) * ours.num_layers
    if ours.model_type in ("mistral", "phi3", "mixtral", "qwen3_moe") or not kinds:
        return (window,) * ours.num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds if kind != "linear_attention")


def _tokens(model: Path, outcome: Outcome) -> list[Fault]:
    """The tokens of every request are those that transformers makes of the same text, where it reads the files."""
    expected = _quietly(lambda: _by_transformers(model, outcome))
    if expected is None:
        return []
    found = []
    for request, ids in zip(outcome.engine.get("requests", []), expected, strict=False):
        if ids is not None and request["token_ids"] != ids:
            said = f"{request['token_ids'][:60]} here, {ids[:60]} there"
            found.append(Fault("tokens unlike transformers", outcome.command[0], said))
    return found[:1]


def _by_transformers(model: Path, outcome: Outcome) -> list[list[int] | None]:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model, local_files_only=True)
    expected: list[list[int] | None] = []
    if outcome.command[0] == "chat":
        system = [{"role": "system", "content": "be\nbrief"}] if "--system" in outcome.command else []
        jobs: list[dict[str, Any]] = [{"messages": [*system, {"role": "user", "content": "hi"}]}]
    else:
        jobs = [json.loads(line) for line in (model.parent / "lines.jsonl").read_text().splitlines()]
        made = {request["id"] for request in outcome.engine.get("requests", [])}
        jobs = [job for place, job in enumerate(jobs) if str(place) in made]
    for job in jobs:
        if "messages" in job:
            chat = tokenizer.apply_chat_template(job["messages"], add_generation_prompt=True, return_dict=False)
            expected.append(list(chat))
        else:
            expected.append(list(tokenizer(job["prompt"])["input_ids"]))
    return expected


def _sampling(model: Path, outcome: Outcome) -> list[Fault]:
    """A chat samples as ``generation_config.json`` says."""
    try:
        said = json.loads((model / "generation_config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return []
    requests = outcome.engine.get("requests", [])
    if not isinstance(said, dict) or not requests:
        return []
    used, found = requests[0]["sampling"], []
    greedy = said.get("do_sample") is False
    for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if said.get(key) is None or (greedy and key == "temperature"):
            continue
        if used[key] != said[key]:
            found.append(
                Fault("sampling unlike generation_config.json", key, f"{used[key]!r} instead of {said[key]!r}")
            )
    if greedy and used["temperature"] != 0:
        found.append(Fault("sampling unlike generation_config.json", "do_sample", f"temperature {used['temperature']}"))
    return found


def _rows(case: Case, outcome: Outcome, work: Path) -> list[Fault]:
    """One row a line, strict JSON, in order, with the line's id; the exit code says whether one is an error."""
    name = "batch"
    if outcome.code == 2 or (outcome.code == 1 and "tpctl: " in outcome.stderr):
        return []  # refused as a whole, which ``judge`` has looked at
    piped = "-" in outcome.command
    try:
        content = outcome.stdout.encode("utf-8", "surrogateescape") if piped else (work / "rows.jsonl").read_bytes()
        rows = [json.loads(line, parse_constant=_refuse) for line in content.decode().split("\n")[:-1]]
    except (OSError, ValueError) as error:
        return [Fault("rows that are no JSON", name, repr(error))]
    given = case.stdin if piped else (work / "lines.jsonl").read_bytes()
    lines = [(number, line) for number, line in enumerate(given.split(b"\n"), start=1) if line.strip()]
    if len(rows) != len(lines):
        return [Fault("rows are missing", name, f"{len(rows)} rows for {len(lines)} lines")]
    found = []
    errors = sum("error" in row for row in rows)
    if outcome.code != int(errors > 0):
        found.append(Fault("exit code unlike the rows", name, f"exit {outcome.code} with {errors} errors"))
    for row, (number, line) in zip(rows, lines, strict=True):
        if "error" in row:
            said = row["error"]
            if not isinstance(said, str) or any(ord(c) < 32 for c in said) or len(said) > 1500:
                found.append(Fault("error row", name, repr(said)[:400]))
            if "cannot be used" in str(said):
                found.append(Fault("error row that nobody foresaw", said.split(": ")[2][:40], repr(said)[:400]))
        with contextlib.suppress(ValueError, RecursionError, AttributeError, KeyError):
            job = json.loads(line.decode("utf-8-sig"))
            id = number if job.get("id") is None else job["id"]
            if row["id"] not in ((id, number) if "error" in row else (id,)):
                found.append(Fault("row of another id", name, f"{row['id']!r} for {line[:100]!r}"))
            plain = set(job) == {"prompt"} and b'"id"' not in given  # whose number may be another line's id
            if plain and case.base == "llama" and case.target == "jsonl" and job["prompt"].isascii():
                found += _answer(job["prompt"], row)
    return found


def _answer(prompt: str, row: dict[str, Any]) -> list[Fault]:
    """The engine of these tests answers with the first tokens of the prompt, and a token is a byte here."""
    if not 0 < len(prompt) < 60 or "</s>" in prompt:
        return []
    if row.get("text") != prompt[:5]:
        return [Fault("wrong answer", "batch", f"{row} for prompt {prompt!r}")]
    return []


def _options(outcome: Outcome) -> list[Fault]:
    """An engine gets the numbers that the command line names, the last one where it names two."""
    config, found = outcome.engine.get("config"), []
    if config is None:
        return []
    given: dict[str, str] = {}
    words = list(outcome.command)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            given[name[2:].replace("-", "_")] = value if equals else words[place + 1] if place + 1 < len(words) else ""
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "gpu_memory_utilization"):
        with contextlib.suppress(ValueError):
            if name in given and config[name] != float(given[name]):
                found.append(Fault("engine unlike the options", name, f"{config[name]!r} for {given[name]!r}"))
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _quietly(read: Callable[[], Any]) -> Any:
    """What ``read`` returns; ``None`` where transformers does not take the files, with whatever error."""
    import transformers

    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)
    try:
        return read()
    except Exception:
        return None
    finally:
        logging.disable(logging.NOTSET)
