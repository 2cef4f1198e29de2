"""aider, which edits files by chat: a message about a file, streamed and whole, in two of its formats.

    python -m tests.clients.aider

A model of 135 million parameters makes no good edits: what is looked at is that aider takes every answer as one.
"""

from __future__ import annotations

from tests.clients.environment import Client, expect, installed, refuses, serving

PACKAGES = ("aider-chat==0.86.2",)
SETTINGS = """
- name: openai/demo
  extra_params: {max_tokens: 120, extra_body: {top_k: 20, min_p: 0.0}}
"""


def main() -> None:
    with installed(*PACKAGES) as client:
        print(client.run("aider", "--version").strip())
        client.run("git", "init", "-q", ".")
        (client.folder / ".aider.model.settings.yml").write_text(SETTINGS)
        (client.folder / "add.py").write_text("def add(a, b):\n    return a - b\n")
        with serving("demo", "--max-model-len", "8192") as server:
            for form in ("whole", "diff", "ask"):
                for stream in ("--stream", "--no-stream"):
                    edit(client, server.url, form, stream)
            refuses(server)


def edit(client: Client, url: str, form: str, stream: str) -> None:
    (client.folder / ".aider.chat.history.md").unlink(missing_ok=True)
    said = client.run(
        "aider",
        *("--model", "openai/demo", "--openai-api-base", f"{url}/v1", "--openai-api-key", "none"),
        *("--edit-format", form, stream, "--message", "Make add() add.", "--map-tokens", "0"),
        *("--yes-always", "--no-auto-commits", "--no-check-update", "--no-show-model-warnings", "--no-analytics"),
        *("--no-gitignore", "--no-pretty", "--no-show-release-notes", "--no-detect-urls", "--timeout", "300"),
        "add.py",
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    _, _, answer = (client.folder / ".aider.chat.history.md").read_text().partition("#### Make add() add.")
    expect(bool(answer.strip()) and "litellm." not in said, f"{form} {stream}", said, answer)


if __name__ == "__main__":
    main()
