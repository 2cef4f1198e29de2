"""``llm``, the command line of Simon Willison's: chats, streams, schemas, completions, options, tools.

python -m tests.clients.llm
"""

from __future__ import annotations

import json

from tests.clients.environment import Client, expect, installed, refuses, serving
from tests.unit.tool_models import HERMES

PACKAGES = ("llm==0.36",)

MODELS = """
- model_id: chat
  model_name: demo
  api_base: {url}/v1
  supports_schema: true
  supports_tools: true
- model_id: text
  model_name: demo
  api_base: {url}/v1
  completion: true
"""
CAPITAL = ("Name the capital of France.", "-o", "temperature", "0")
TOOL = 'def capital_of(country: str) -> str:\n    "Tells the capital"\n    return "Paris of " + country\n'


def main() -> None:
    with installed(*PACKAGES) as client:
        template = client.folder / "tools.jinja"
        template.write_text(HERMES)  # the model's own reads no tools
        with serving("demo", "--chat-template", str(template)) as server:
            check(client, server.url)
            refuses(server)


def check(client: Client, url: str) -> None:
    (client.folder / "extra-openai-models.yaml").write_text(MODELS.format(url=url))
    (client.folder / "tool.py").write_text(TOOL)

    def llm(*arguments: str) -> str:
        return client.run("llm", *arguments, LLM_USER_PATH=str(client.folder)).rstrip("\n")

    print(llm("--version"))
    streamed = llm("-m", "chat", *CAPITAL)
    expect("Paris" in streamed and streamed == llm("-m", "chat", *CAPITAL, "--no-stream"), "a chat", streamed)
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    dog = json.loads(llm("-m", "chat", "Describe a dog.", "--schema", json.dumps(schema), "-o", "max_tokens", "200"))
    expect(dog.keys() == {"name", "age"}, "a schema", dog)
    said = llm("-m", "text", "The capital of Italy is", "-o", "temperature", "0", "-o", "max_tokens", "2")
    expect(said == " Rome.", "a completion", said)
    told = llm("-m", "text", "The capital of Italy is", "--no-stream", "-o", "max_tokens", "2", "-o", "logprobs", "2")
    answer = json.loads(llm("logs", "-n", "1", "--json"))[0]["response_json"]["choices"][0]
    expect(len(answer["logprobs"]["top_logprobs"]) == 2, "log-probabilities", told, answer)
    options = {"seed": 1, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.5, "max_tokens": 20}
    chosen = [part for name, value in options.items() for part in ("-o", name, str(value))]
    one, again = (llm("-m", "chat", "Tell me a story.", *chosen) for _ in range(2))
    expect(one == again, "options, and a seed", one, again)
    logged = json.loads(llm("logs", "-n", "1", "--json"))[0]
    expect(logged["output_tokens"] == 20, "the usage that a stream tells", logged)
    sizes = []
    for offered in ((), ("--functions", "tool.py")):
        llm("-m", "chat", "What is the capital of France?", *offered, "-o", "max_tokens", "20")
        sizes.append(json.loads(llm("logs", "-n", "1", "--json"))[0]["input_tokens"])
    expect(sizes[0] + 20 < sizes[1], "tools are offered, and are in the prompt", sizes)
    continued = llm("-c", "And of Italy?", "-o", "max_tokens", "10")
    expect(bool(continued), "a conversation goes on", continued)


if __name__ == "__main__":
    main()
