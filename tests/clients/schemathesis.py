"""schemathesis, which makes requests of what the server says of itself: /openapi.json.

    python -m tests.clients.schemathesis [--quick] [--examples 10] [--venvs FOLDER]

First whole bodies, right and wrong ones: what is wrong is refused, nothing fails, answers are as they are described.
Then each field alone in a body that is right besides, so that most are answered; a field that depends on no other and
not on the model must be taken in all the values that its description has. ``--quick`` leaves the fields out. The model
is two layers of the demo model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import httpx2

from tests.clients.environment import PARSER, Client, answered, expect, installed, serving
from tests.distributed.serve_soak import with_layers
from tests.unit.tool_models import HERMES

PACKAGES = ("schemathesis==4.32.5",)

RIGHT: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 3},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 3},
}
"""Bodies that are answered soon."""

BESIDE: Mapping[str, dict[str, Any]] = {"stream_options": {"stream": True}}
"""What a field is refused without."""

DEPENDENT = frozenset(
    {"best_of", "chat_template_kwargs", "choice", "grammar", "guided_choice", "guided_json", "guided_regex", "input"}
    | {"ignore_eos", "instructions", "logit_bias", "max_completion_tokens", "max_output_tokens", "max_tokens", "stop"}
    | {"messages", "min_tokens", "model", "parallel_tool_calls", "prompt", "prompt_logprobs", "reasoning", "regex"}
    | {"reasoning_effort", "response_format", "stop_token_ids", "stream_options", "structured_outputs", "text"}
    | {"tool_choice", "tools", "top_logprobs"}
)
"""Fields of which other fields, the model or its grammar say what can be had, or that no text with half a surrogate
pair may be in."""


def main() -> None:
    PARSER.add_argument("--examples", type=int, default=10)
    PARSER.add_argument("--quick", action="store_true")
    args = PARSER.parse_args()
    with installed(*PACKAGES) as client:
        print(client.run("schemathesis", "--version").strip())
        template = client.folder / "tools.jinja"
        template.write_text(HERMES)
        model = with_layers(2, client.folder)
        limits = ("--max-model-len", "128", "--api-key", "key", "--chat-template", str(template))
        with serving(model, *limits, TPCTL_CACHE=str(client.folder)) as server:
            whole = httpx2.get(f"{server.url}/openapi.json").json()
            loose = "--exclude-checks=positive_data_acceptance"
            check(client, server.url, whole, "whole bodies", args.examples * 4, "--phases=fuzzing", loose)
            if args.quick:
                return
            each = ("--phases=coverage,fuzzing", "-m", "positive")
            free = alone(whole, lambda name: name not in DEPENDENT)
            check(client, server.url, free, "fields by themselves", args.examples, *each)
            rest = alone(whole, lambda name: name in DEPENDENT)
            check(client, server.url, rest, "other fields", args.examples, *each, loose)
            counts = {path: count for (path, status), count in answered(server).items() if status == 200}
            expect(all(counts[path] > 100 for path in RIGHT), f"many were answered: {counts}")


def alone(whole: dict[str, Any], wanted: Any) -> dict[str, Any]:
    """A description with a path for each field that is ``wanted``, told apart by queries, which the server ignores."""
    paths = {}
    for path, right in RIGHT.items():
        operation = whole["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        for name, values in schema["properties"].items():
            if not wanted(name):
                continue
            beside = {**right, **BESIDE.get(name, {})}
            fields = {**{key: {"const": value} for key, value in beside.items()}, name: values}
            body = {**schema, "properties": fields, "required": sorted({*beside, name})}
            content = {"required": True, "content": {"application/json": {"schema": body}}}
            paths[f"{path}?{name}"] = {
                "post": {**operation, "operationId": f"{path}{name}", "requestBody": content},
            }
    return {**whole, "paths": paths}


def check(client: Client, url: str, description: dict[str, Any], what: str, most: int, *options: str) -> None:
    file = client.folder / "openapi.json"
    file.write_text(json.dumps(description))
    said = client.run(
        "schemathesis",
        "run",
        file,
        *("--url", url, "-H", "Authorization: Bearer key"),
        *("-n", str(most), "--seed", "1"),
        *("--continue-on-failure", "--no-shrink", "--suppress-health-check", "all", "--warnings", "off"),
        *("--request-timeout", "120"),
        *options,
    )
    (cases,) = re.findall(r"(\d+) generated", said)
    expect("failure" not in said.splitlines()[-1], f"{what}: {len(description['paths'])} operations, {cases} requests")


if __name__ == "__main__":
    main()
