"""datatrove's InferenceRunner: its CustomServer starts ``tpctl serve`` and waits for it, then documents are answered.

python -m tests.clients.datatrove
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.clients.environment import SETTINGS, expect, installed
from tests.unit.tool_models import HERMES

PACKAGES = ("datatrove==0.10.1", "aiofiles", "aiosqlite", "httpx", "orjson", "pandas", "pyyaml", "typer")
SCRIPT = Path(__file__).parents[2] / "examples" / "datatrove_server.py"
DOCUMENTS = 40

PIPELINE = """
import json, sys
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.writers import JsonlWriter

asked = json.loads(sys.argv[1])


async def rollout(document, generate):
    if asked["chat"]:
        payload = {"messages": [{"role": "user", "content": document.text}], "max_tokens": 30}
    else:
        payload = {"prompt": document.text, "max_tokens": 8}
    result = await generate(payload)
    return {"text": result.text, "finish_reason": result.finish_reason, "usage": result.usage}


texts = [f"{number}. Name the capital of France." for number in range(asked["documents"])]
runner = InferenceRunner(
    rollout_fn=rollout,
    config=InferenceConfig(
        server_type="custom",
        model_name_or_path="demo",
        use_chat=asked["chat"],
        default_generation_params={"temperature": 0, "seed": 1, "top_k": -1, "repetition_penalty": 1.0},
        model_kwargs={"server_script": asked["script"], "model": "demo", **asked["options"]},
        server_log_folder="logs",
        server_ready_delay_sec=0.2,
        max_concurrent_generations=16,
    ),
    output_writer=JsonlWriter("out", output_filename="${rank}.jsonl", compression=None),
)
LocalPipelineExecutor(
    pipeline=[[Document(text=text, id=str(at)) for at, text in enumerate(texts)], runner], logging_dir="log", tasks=1
).run()
"""


def main() -> None:
    with installed(*PACKAGES, beside=True) as client:
        version = "import importlib.metadata as m; print('datatrove', m.version('datatrove'))"
        print(client.run("python", "-c", version).strip())
        (client.folder / "pipeline.py").write_text(PIPELINE)
        template = client.folder / "chat.jinja"
        template.write_text(HERMES)
        names = [part.removeprefix("--") for part in SETTINGS]
        options = {**dict(zip(names[::2], names[1::2], strict=True)), "chat-template": str(template)}
        for chat in (True, False):
            asked = {"chat": chat, "documents": DOCUMENTS, "script": str(SCRIPT), "options": options}
            home = str(Path.home())  # where tpctl's cache is
            client.run("python", "pipeline.py", json.dumps(asked), HOME=home)
            check(client.folder, chat=chat)


def check(folder: Path, *, chat: bool) -> None:
    what = "chats" if chat else "texts"
    (file,) = (folder / "out").glob("*.jsonl")
    rows = [json.loads(line)["metadata"]["rollout_results"][0] for line in file.read_text().splitlines()]
    expect(
        len(rows) == DOCUMENTS and all(row["usage"]["completion_tokens"] for row in rows), f"{DOCUMENTS} {what}", rows
    )
    (log,) = (folder / "logs").glob("*.log")
    said = log.read_text()
    expect("Uvicorn running on" in said and "Traceback" not in said, f"{what}: the server's log", said)
    for path in (file, log, *(folder / "log").rglob("*.json")):
        path.unlink()
    for path in (folder / "log" / "completions").glob("*"):
        path.unlink()


if __name__ == "__main__":
    main()
