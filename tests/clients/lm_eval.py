"""lm-evaluation-harness: tasks on data of this file, over ``tpctl serve`` and by lm-eval's own backend of transformers.

    python -m tests.clients.lm_eval

``local-completions`` takes log-likelihoods of choices and of whole texts, which must be those of transformers in
float32 to 1e-4 and to 2e-4, and generates; ``local-chat-completions`` generates. Whether an answer is the likeliest one
is known of choices; lm-eval does not ask it of whole texts. The tokenizer is a folder's, or the server's own.
transformers' logits are normalised in float64: torch's float32 log_softmax, lm-eval's default, is off by 1e-5 a token
on a CPU, always to the same side. This model's residuals reach 24,830, where float32 knows no better: of one token of a
text tpctl's weights, packed for a processor, are up to 8e-5 from float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.clients.environment import Client, expect, installed, refuses, serving
from tpctl.checkpoint.sources import resolve

PACKAGES = ("lm-eval[api]==0.4.13", "accelerate==1.15.0", "peft==0.21.2")
CLOSE, CLOSE_TEXTS = 1e-4, 2e-4

FACTS = [
    ("The capital of France is", [" Paris", " London", " a kind of bread"], " It lies on the Seine."),
    (
        "Water freezes at",
        [" zero degrees Celsius", " a hundred degrees Celsius"],
        "\n\nIce floats, as everybody knows.",
    ),
    ("Das grüne Haus ist", [" grün", " blau 🙂"], " Niemand wohnt darin.\tWarum?"),
    ("def add(a, b):\n    return", [" a + b", " a - b", "\n"], "\n\n\nprint(add(1, 2))\n"),
    ("日本の首都は", ["東京", "京都です"], "。"),
    ("One, two, three,", [" four", " seven", " 4"], " five, six, seven, eight, nine, ten." * 6),
]
LINES = [
    {"question": question, "choices": choices, "answer": 0, "text": question + choices[0] + rest}
    for question, choices, rest in FACTS
]

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
"""
TASKS = {
    "choice": """
task: choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "generate": """
task: generate
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
""",
}


def main() -> None:
    folder = resolve("demo").folder
    with installed(*PACKAGES, beside=True) as client:
        print(
            client.run("python", "-c", "import importlib.metadata as m; print('lm-eval', m.version('lm_eval'))").strip()
        )
        tasks = write_tasks(client.folder)
        hf = ("hf", f"pretrained={folder},dtype=float32,softmax_dtype=float64", "--device", "cpu")
        own = evaluate(client, tasks, *hf)
        chatted = evaluate(client, tasks, *hf, "--apply_chat_template", names="generate")
        with serving() as server:
            url = f"model=demo,base_url={server.url}/v1/completions,num_concurrent=4"
            compare(own, evaluate(client, tasks, "local-completions", f"{url},tokenizer={folder}"), "local-completions")
            for arguments, options, what in (
                (f"tokenizer={folder},tokenized_requests=False", (), "with texts instead of tokens"),
                (f"tokenizer={folder}", ("--batch_size", "4"), "four prompts a request"),
                ("tokenizer_backend=remote", (), "with the server's tokenizer"),
            ):
                compare(own, evaluate(client, tasks, "local-completions", f"{url},{arguments}", *options), what)
            url = f"model=demo,base_url={server.url}/v1/chat/completions,num_concurrent=4"
            found = evaluate(client, tasks, "local-chat-completions", url, "--apply_chat_template", names="generate")
            expect(found == chatted, "local-chat-completions: the same texts", found, chatted)
            refuses(server)


def write_tasks(folder: Path) -> Path:
    tasks = folder / "tasks"
    tasks.mkdir()
    data = tasks / "facts.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(text + COMMON.format(data=data))
    return tasks


def evaluate(client: Client, tasks: Path, model: str, arguments: str, *more: str, names: str = "") -> dict[str, Any]:
    """Each task's samples: what the model answered, in their order."""
    out = client.folder / f"out{len(list(client.folder.glob('out*')))}"
    command = [
        "--model",
        model,
        "--model_args",
        arguments,
        "--tasks",
        names or ",".join(TASKS),
        "--include_path",
        tasks,
    ]
    client.run("lm_eval", *command, "--log_samples", "--output_path", out, *more)
    found = {}
    for file in out.rglob("samples_*.jsonl"):
        rows = sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["doc_id"])
        found[file.name.split("_")[1]] = [row["resps"] for row in rows]
    return found


def compare(own: dict[str, Any], served: dict[str, Any], what: str) -> None:
    """Log-likelihoods, whether each of the choices is the likeliest answer, and texts."""
    choices = [
        (one[0], other[0])
        for ours, theirs in zip(own["choice"], served["choice"], strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    texts = [(one[0], other[0]) for one, other in zip(own["rolling"], served["rolling"], strict=True)]
    for pairs, close, of in ((choices, CLOSE, "choices"), (texts, CLOSE_TEXTS, "whole texts")):
        apart = max(abs(float(one[0]) - float(other[0])) for one, other in pairs)
        far = f"{what}: {len(pairs)} log-likelihoods of {of}, at most {apart:.1e} from transformers'"
        expect(apart <= close, far, pairs)
    greedy = [(one[1], other[1]) for one, other in choices]
    expect(all(one == other for one, other in greedy), f"{what}: the same ones of the choices are greedy", greedy)
    expect(own["generate"] == served["generate"], f"{what}: the same texts", own["generate"], served["generate"])


if __name__ == "__main__":
    main()
