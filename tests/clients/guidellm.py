"""guidellm, which measures servers: chats, texts and responses of synthetic prompts, streamed and whole.

python -m tests.clients.guidellm
"""

from __future__ import annotations

import json
from typing import Any

from tests.clients.environment import Client, expect, installed, refuses, serving
from tpctl.checkpoint.sources import resolve

PACKAGES = ("guidellm==0.8.1",)
REQUESTS, TOKENS = 12, 16


def main() -> None:
    with installed(*PACKAGES, beside=True) as client:
        print(client.run("guidellm", "--version").strip())
        with serving() as server:
            for path in ("chat/completions", "completions", "responses"):
                for profile in ("concurrent,streams=4", "poisson,rate=8"):
                    measure(client, server.url, path, profile, stream=True)
                measure(client, server.url, path, "synchronous", stream=False)
            refuses(server)


def measure(client: Client, url: str, path: str, profile: str, *, stream: bool) -> None:
    out = client.folder / "out.json"
    backend = f"kind=openai_http,target={url},request_format=/v1/{path},stream={str(stream).lower()}"
    client.run(
        "guidellm",
        "run",
        *("--backend", backend),
        *("--profile", f"kind={profile}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--tokenizer", f"kind=hf_auto,model={resolve('demo').folder}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={TOKENS}"),
        *("--output", f"kind=json,path={out}"),
        "--disable-console",
    )
    (found,) = json.loads(out.read_text())["benchmarks"]
    totals, metrics = found["metrics"]["request_totals"], found["metrics"]
    tokens = [request["output_metrics"]["text_tokens"] for request in found["requests"]["successful"]]
    what = f"/v1/{path} {profile.partition(',')[0]}{'' if stream else ', whole'}"
    expect(totals["successful"] == totals["total"] == REQUESTS, f"{what}: {REQUESTS} requests", totals)
    expect(set(tokens) == {TOKENS}, f"{what}: answers of {TOKENS} tokens", tokens)
    first = _median(metrics["time_to_first_token_ms"])
    print(f"    first token {first:.0f} ms, then {_median(metrics['inter_token_latency_ms']):.0f} ms a token")


def _median(metric: dict[str, Any]) -> float:
    return float(metric["successful"]["median"])


if __name__ == "__main__":
    main()
