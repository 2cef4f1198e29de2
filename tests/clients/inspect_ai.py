"""inspect-ai: evaluations over ``tpctl serve``, by its providers of OpenAI-compatible servers and of vLLM's.

    python -m tests.clients.inspect_ai

The model's chat template is given tools. What inspect-ai has understood is read from its logs.
"""

from __future__ import annotations

import json
from typing import Any

from tests.clients.environment import Client, expect, installed, refuses, serving
from tests.unit.tool_models import HERMES

PACKAGES = ("inspect-ai==0.3.285", "openai")

TASKS = '''
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, ResponseSchema
from inspect_ai.scorer import choice, includes
from inspect_ai.solver import generate, multiple_choice, use_tools
from inspect_ai.tool import ToolFunction, tool
from inspect_ai.util import json_schema
from pydantic import BaseModel

FRANCE = {"input": "Name the capital of France.", "target": "Paris"}
CHOICES = Sample(input="Which is the capital of France?", choices=["Paris", "Rome"], target="A")


class City(BaseModel):
    capital: bool
    district: int


@tool
def lookup():
    async def execute(country: str) -> str:
        """Look up the capital of a country.

        Args:
            country: its name
        """
        return "Paris"

    return execute


@task
def plain():
    return Task(dataset=[Sample(**FRANCE) for _ in range(8)], solver=generate(), scorer=includes())


@task
def formed():
    form = ResponseSchema(name="city", json_schema=json_schema(City), strict=True)
    return Task(dataset=[Sample(**FRANCE)], solver=generate(), config=GenerateConfig(response_schema=form))


@task
def called():
    choose = use_tools(lookup(), tool_choice=ToolFunction(name="lookup"))
    return Task(dataset=[Sample(**FRANCE)], solver=[choose, generate(tool_calls="single")])


@task
def chosen():
    return Task(dataset=[CHOICES], solver=multiple_choice(), scorer=choice())
'''
PROVIDERS = ("openai-api/tpctl/demo", "vllm/demo")
MORE = {
    "seed": "3",
    "top-p": "0.9",
    "top-k": "20",
    "frequency-penalty": "0.1",
    "presence-penalty": "0.1",
    "stop-seqs": "zzz",
    "num-choices": "2",
}


def main() -> None:
    with installed(*PACKAGES) as client:
        print("inspect-ai", client.run("inspect", "--version").strip())
        (client.folder / "tasks.py").write_text(TASKS)
        template = client.folder / "tools.jinja"
        template.write_text(HERMES)
        with serving("demo", "--chat-template", str(template)) as server:
            for provider in PROVIDERS:
                check(client, server.url, provider)
            for provider in ("openai-api-completions/tpctl/demo", "vllm-completions/demo"):
                found = evaluate(client, server.url, provider, "plain", **{"prompt-logprobs": "1", "logprobs": ""})
                told = [one["choices"][0] for one in found]
                expect(
                    all(one["prompt_logprobs"] and one["logprobs"] for one in told), f"{provider}: log-probabilities"
                )
            found = evaluate(client, server.url, PROVIDERS[0], "plain", options=("-M", "responses_api=true"))
            expect(all(_text(one) for one in found), "over /v1/responses", found)
            refuses(server)


def check(client: Client, url: str, provider: str) -> None:
    found = evaluate(client, url, provider, "plain")
    expect(all("Paris" in _text(one) for one in found), f"{provider}: 8 chats", found)
    (found,) = evaluate(client, url, provider, "formed")
    expect(json.loads(_text(found)).keys() == {"capital", "district"}, f"{provider}: a schema", found)
    (found,) = evaluate(client, url, provider, "called")
    (call,) = found["choices"][0]["message"]["tool_calls"]
    expect(call["function"] == "lookup" and "country" in call["arguments"], f"{provider}: a tool's call", call)
    (found,) = evaluate(client, url, provider, "chosen")
    expect(bool(_text(found)), f"{provider}: a multiple choice", found)
    asked = {**MORE, "logprobs": "", "top-logprobs": "2", "prompt-logprobs": "1"}
    found = evaluate(client, url, provider, "plain", **asked)
    for one in found:
        two = one["choices"]
        expect(len(two) == 2 and all(choice["logprobs"]["content"] for choice in two), f"{provider}: every option", one)
        expect(bool(two[0]["prompt_logprobs"]["content"]), f"{provider}: the prompt's log-probabilities", one)
    expect(len(found) == 8, f"{provider}: of 8 chats", found)


def evaluate(
    client: Client, url: str, provider: str, task: str, options: tuple[str, ...] = (), **asked: str
) -> list[dict[str, Any]]:
    """What came of each sample."""
    logs = client.folder / f"logs{len(list(client.folder.glob('logs*')))}"
    settings = {"temperature": "0", "max-tokens": "60", **asked}
    chosen = [part for name, value in settings.items() for part in (f"--{name}", value) if part]
    where = {f"{name}_{what}": value for name in ("TPCTL", "VLLM") for what, value in (("BASE_URL", f"{url}/v1"),)}
    client.run(
        "inspect",
        "eval",
        f"tasks.py@{task}",
        *("--model", provider, "--log-dir", str(logs), "--log-format", "json", "--display", "plain"),
        *chosen,
        *options,
        TPCTL_API_KEY="none",
        VLLM_API_KEY="none",
        **where,
    )
    (file,) = logs.glob("*.json")
    log = json.loads(file.read_text())
    expect(log["status"] == "success", f"{provider} {task}", log.get("error"))
    return [sample["output"] for sample in log["samples"]]


def _text(output: dict[str, Any]) -> str:
    content = output["choices"][0]["message"]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


if __name__ == "__main__":
    main()
