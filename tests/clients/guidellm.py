"""guidellm, which measures servers: chats, texts and responses of synthetic prompts, streamed and whole.

python -m tests.clients.guidellm
"""

from __future__ import annotations

import json
from typing import Any

from tests.clients.environment import Client, answered, expect, installed, refuses, serving
from tests.distributed.server_process import ServerProcess
from tpctl.checkpoint.sources import resolve

PACKAGES = ("guidellm==0.8.1",)
REQUESTS, TOKENS = 12, 16


def main() -> None:
    with installed(*PACKAGES, beside=True) as client:
        print(client.run("guidellm", "--version").strip())
        with serving() as server:
            for path in ("chat/completions", "completions", "responses"):
                for profile in ("concurrent,streams=4", "poisson,rate=8"):
                    measure(client, server, path, profile, stream=True)
                measure(client, server, path, "synchronous", stream=False)
            refuses(server)


def measure(client: Client, server: ServerProcess, path: str, profile: str, *, stream: bool) -> None:
    """All requests are answered. Of its report the last may be missing: it ends when the messages of its workers have
    been counted, and a thread that gets no processor for 0.1 s then has not handed on the last of them yet
    (``WorkerProcessGroup.request_updates``). With 0.35 s of sleep there it is always so, and the server has answered.
    """
    out = client.folder / "out.json"
    before = answered(server).get((f"/v1/{path}", 200), 0)
    backend = f"kind=openai_http,target={server.url},request_format=/v1/{path},stream={str(stream).lower()}"
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
    count = answered(server)[f"/v1/{path}", 200] - before
    expect(count == REQUESTS, f"{what}: {REQUESTS} requests are answered", count)
    told = totals["successful"] == totals["total"] and totals["total"] in (REQUESTS, REQUESTS - 1)
    expect(told, f"{what}: {totals['total']} are told of, and none that failed", totals)
    expect(set(tokens) == {TOKENS}, f"{what}: answers of {TOKENS} tokens", tokens)
    first = _median(metrics["time_to_first_token_ms"])
    print(f"    first token {first:.0f} ms, then {_median(metrics['inter_token_latency_ms']):.0f} ms a token")


def _median(metric: dict[str, Any]) -> float:
    return float(metric["successful"]["median"])


if __name__ == "__main__":
    main()
