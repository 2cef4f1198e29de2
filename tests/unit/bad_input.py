"""Every wrong command line that tests know, with its answer, and a way to ask: one table.

Run as a module this answers commands one after another: a folder and a command as JSON a line on stdin, an ``Answer``
as JSON a line on stdout.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from tests.unit.hub_server import Refusal
from tpctl.cli import app as app_module


@dataclass(frozen=True)
class Case:
    """A wrong command line, given in a folder as ``bad_folders.prepare`` makes it.

    Attributes:
        said: a part of the answer, whatever its case.
        code: the exit code, of those that are not on the page.
        title: what is wrong, for ``docs/bad-input.md``, which has the whole answer.
        hub, refusal: it is asked beside a Hub, which refuses so.
    """

    command: str
    said: str = ""
    code: int = 1
    title: str = ""
    hub: bool = False
    refusal: Refusal | None = None


WRITERS = (
    "shard model --tp 2 -o",
    "shard model --tp 2 --ranks 0 -o",
    "shard model --tp 2 --force -o",
    "merge shards -o",
    "reshard shards --tp 3 -o",
    "download model -o",
    "inspect-shards shards --html",
)
CASES = [
    # the rows of docs/bad-input.md, in order
    Case("shard nowhere --tp 2", title="no such model"),
    Case("shard mamba --tp 2", title="unknown architecture"),
    Case("shard pickles --tp 2", title="weights as pickles only"),
    Case("shard model --tp 5", title="more ranks than query heads"),
    Case("shard model --tp 0", title="no ranks"),
    Case("shard model --tp two", title="no number"),
    Case("shard narrow --tp 2", title="config.json of another model"),
    Case("shard capped --tp 2", title="a field of another architecture"),
    Case("shard scaled --tp 2", title="a field that nothing knows"),
    Case("shard awq --tp 2", title="quantised weights that no config tells of"),
    Case("shard lora --tp 2", title="an adapter"),
    Case("shard wide --tp 2 --dtype float16", title="a value beyond the range of a cast"),
    Case("shard short --tp 2", title="a truncated weight file"),
    Case("shard shards --tp 4", title="a shard folder to be cut"),
    Case("shard model --tp 2 --ranks 5", title="a rank that does not exist"),
    Case("shard model --tp 2 --ranks 3-1", title="no list of ranks"),
    Case("shard model --tp 2 --dtype int3", title="an unknown dtype"),
    Case("shard model --tp 2 --max-part-size 5", title="a size without a unit"),
    Case("shard model --tp 3 --compat vllm", title="an uneven split for vLLM"),
    Case("shard model --tp 2 --compat trt", title="an unknown engine"),
    Case("shard model --tp 2 --expert-parallel", title="no experts to deal"),
    Case("shard experts --tp 2 --expert-parallel --ep 2", title="two ways to deal them"),
    Case("shard experts --tp 4 --ep 3", title="groups that do not divide the ranks"),
    Case("shard model --tp 2 -o shards", title="an output that exists"),
    Case("shard model --tp 2 --ranks 1 -o some", title="ranks added where listed files are elsewhere"),
    Case("reshard model --tp 3 -o out", title="no shard folder"),
    Case("reshard shards --tp 5 -o out", title="more ranks than query heads, anew"),
    Case("reshard rank0 --tp 3 -o out", title="a rank that was not cut"),
    Case("reshard flipped --tp 3 -o out", title="damaged data, resharding"),
    Case("merge rank0 -o out", title="a rank that was not cut, merging"),
    Case("merge shards -o shards --force", title="an output that is what is read"),
    Case("merge shards -o loop", title="a link to itself as the output"),
    Case("merge flipped -o out", title="damaged data, merging"),
    Case("merge some -o out", title="a part that is not there, merging"),
    Case("inspect-shards model", title="not a shard folder"),
    Case("inspect-shards shards --rank 7", title="no such rank"),
    Case("inspect-shards shards --rank -1", title="a negative rank"),
    Case("inspect-shards cut", title="a truncated part"),
    Case("inspect-shards flipped --verify", title="a flipped bit in the data"),
    Case("inspect-shards header --verify", title="a flipped bit in a header"),
    Case("inspect-shards manifest --verify", title="a flipped bit in the manifest"),
    Case("inspect-shards edited --verify", title="an edited copy of a file"),
    Case("inspect-shards stray --verify", title="a part file of another run"),
    Case("inspect-shards some --rank 1 --verify", title="a rank whose files are elsewhere"),
    Case("inspect-shards shards --source other", title="another model as the source"),
    Case("inspect-shards shards --source shards", title="shards as the source"),
    Case("inspect-shards shards --html nowhere/page.html", title="a page that cannot be written"),
    Case("plan model --gpu-memory 80", title="memory without a unit"),
    Case("plan model --gpu-memory lots", title="no size"),
    Case("plan model --max-model-len 1000", title="more tokens than the model allows"),
    Case("plan model --tp 5", title="more ranks than query heads, planning"),
    Case("plan empty", title="nothing to plan"),
    Case("batch prompts.jsonl --model unrun -o rows.jsonl", title="a model that is cut and not run yet"),
    Case("batch prompts.jsonl -o model", title="a folder of other files for a batch"),
    Case("batch shards -o rows.jsonl", title="shards in the place of prompts"),
    Case("batch prompts.jsonl --replicas 2", title="replicas, and no place for parts"),
    Case("batch prompts.jsonl --hosts slurm", title="hosts, and no place for parts"),
    Case("batch prompts.jsonl -o rows/ --hosts slurm", title="SLURM's hosts outside of a SLURM job"),
    Case("batch prompts.jsonl -o rows/ --hosts prompts.jsonl", title="a file that holds no hosts"),
    Case("batch prompts.jsonl -o rows/ --hosts absent", title="a file of hosts that is not there"),
    Case("batch prompts.jsonl -o rows/ --tp 2 --nnodes 2", title="several hosts that are not told where to meet"),
    Case(
        "batch prompts.jsonl -o rows/ --nnodes 2 --node-rank 0 --rdzv-endpoint gpu1:29500",
        title="a model over several hosts, into parts",
    ),
    Case(
        "chat model --tp 3 --nnodes 2 --node-rank 0 --rdzv-endpoint gpu1:29500 -m hi",
        title="ranks that hosts cannot share evenly",
    ),
    Case("chat model --speculate mtp -m hi", title="drafts by a layer that the model lacks"),
    Case("replica model --share 3/2", title="a share that is none"),
    Case("batch prompts.jsonl --ray auto", title="a Ray cluster, and no place for parts"),
    Case("batch prompts.jsonl -o rows/ --ray head", title="no address of a Ray cluster"),
    Case("batch prompts.jsonl -o rows/ --ray 127.0.0.1:1", title="an address where no Ray cluster is"),
    Case("batch prompts.jsonl -o rows/ --ray auto --replicas 0", title="a Ray cluster, and no replica on it"),
    Case("batch - -o rows/", title="parts of what is no file"),
    Case("batch prompts.jsonl -o rows/ --retry-errors", title="errors to be tried again of a batch that is new"),
    Case("batch prompts.jsonl -o rows.jsonl --part-rows 5", title="parts of one engine's file"),
    Case("batch mixed.jsonl -o rows.jsonl", title="lines of two forms"),
    Case("batch openai.jsonl -o new.parquet", title="Parquet of OpenAI's lines"),
    Case("batch openai.jsonl -o rows/ --keep-columns label", title="columns of OpenAI's lines"),
    Case("batch prompts.jsonl -o rows.jsonl --prompt-column text", title="a field that no line has"),
    Case("batch rows.parquet -o rows.jsonl", title="a table without a column prompt"),
    Case("batch rows.parquet -o rows.jsonl --prompt-column text", title="a column that is not there"),
    Case("batch rows.parquet -o rows.jsonl --prompt-column label", title="prompts that are numbers"),
    Case(
        "batch rows.parquet -o rows.jsonl --prompt-column question --keep-columns image", title="bytes to keep in JSON"
    ),
    Case("batch 'none-*.parquet' -o rows/", title="a pattern that no file has"),
    Case("batch tables -o tables/rows.parquet --prompt-column question", title="rows among the input's files"),
    Case("batch status model", title="no batch to tell of"),
    Case("replica model", title="no batch to answer"),
    Case("serve nowhere --port 0", title="no model to serve"),
    Case("serve model --port 70000", title="no port"),
    Case("serve model --host 192.0.2.1 --port 0", title="an address of another host"),
    Case("serve model --max-body 5", title="the longest body, without a unit"),
    Case("serve model --max-memory 2", title="what requests may hold, without a unit"),
    Case("serve model --allowed-origin localhost:3000", title="a web page's origin without its scheme"),
    Case("serve model --max-memory 100KiB", title="what requests may hold, too little for any"),
    Case("serve model --api-key ''", title="a key that is empty"),
    Case("serve model --temperature=-1", title="what requests leave out, out of range"),
    Case("serve model --replicas 65", title="more replicas than there may be"),
    Case(
        "serve model --replicas 2 --nnodes 2 --node-rank 0 --rdzv-endpoint gpu1:29500",
        title="engines over several hosts",
    ),
    Case("bench quality shards --text absent.txt", title="a text that is not there"),
    Case("bench serve --url http://127.0.0.1:1", title="no server to measure"),
    Case("bench serve --url localhost:8000", title="no address"),
    Case("bench serve --rate 1,fast", title="no rates"),
    Case("bench serve --slo latency:5", title="no limit"),
    Case("bench serve --body [1]", title="fields that are no object"),
    Case("bench serve --prompts absent.jsonl", title="prompts that are not there"),
    Case("bench serve --token-ids --endpoint chat", title="token ids for a chat"),
    Case("bench serve -o shards/tpctl.json", title="results over another file"),
    Case("upload empty org/shards", title="nothing to upload"),
    Case("upload cut org/shards", title="damaged shards to upload"),
    Case("upload shards shards", title="no repository"),
    Case("download model --local-ranks 0", title="ranks of what is not on the Hub"),
    Case("download org/absent", title="a model that the Hub does not know", hub=True),
    Case("download org/whole --revision v9", title="a revision that it does not know", hub=True),
    Case(
        "download org/whole",
        title="a gated model",
        hub=True,
        refusal=Refusal("/api/", 403, {"X-Error-Code": "GatedRepo"}),
    ),
    Case("download org/whole", title="access forbidden", hub=True, refusal=Refusal("/api/", 403)),
    Case("download org/whole", title="no token, or a wrong one", hub=True, refusal=Refusal("/api/", 401)),
    Case(
        "download org/whole", title="too many requests", hub=True, refusal=Refusal("/api/", 429, {"Retry-After": "7"})
    ),
    Case("download org/whole", title="the Hub fails", hub=True, refusal=Refusal("/api/", 500)),
    Case("download org/whole --local-ranks 0", title="ranks of an unsharded model", hub=True),
    Case("download org/shards --local-ranks 3", title="a rank that the repository lacks", hub=True),
    Case("download org/whole -o model", title="an output with other files", hub=True),
    Case(
        "upload shards org/new --token hf_x",
        title="no right to write",
        hub=True,
        refusal=Refusal("/api/repos/create", 403),
    ),
    # links that lead back to themselves
    *(
        Case(f"{command} loop{below}", f"loop{below} is a link that leads back to itself; choose another place")
        for command in WRITERS
        for below in ("", "/x")
        if (command, below) != ("merge shards -o", "")  # on the page
    ),
    # others
    Case("shard ./nowhere --tp 2", "there is no file or folder ./nowhere; MODEL is"),
    Case("shard empty --tp 2", "empty has no config.json; a checkpoint folder holds config.json and *.safetensors"),
    Case("shard file --tp 2", "file is no model: a file must be a .gguf, which begins with the letters GGUF"),
    Case("shard torn --tp 2", "model-00002-of-00002.safetensors is truncated: its tensors end at byte"),
    Case("shard incomplete --tp 2", "1 of 2 weight files is not there (the first is model-00002-of-00002.safetensors)"),
    Case("shard latin --tp 2", "model.safetensors.index.json is not a safetensors index"),
    Case(
        "shard quantised --tp 2",
        'the checkpoint is quantised ("bitsandbytes"), which is not supported: it is made while',
    ),
    Case("shard wrong --tp 2", "40 x 24 in the checkpoint but 41 x 24 by config"),
    Case("shard notjson --tp 2", "notjson/config.json is not valid JSON"),
    Case("shard shards --tp 3", "shards is cut into shards already; use `tpctl reshard shards --tp 3 -o FOLDER`"),
    # commands that can be pasted into a shell, where a name needs quotes
    Case("shard 'my shards' --tp 3", "use `tpctl reshard 'my shards' --tp 3 -o FOLDER`"),
    Case("reshard 'my rank' --tp 3 -o out", "`tpctl shard MODEL --tp 2 --ranks 1 -o 'my rank'`"),
    Case(
        "batch prompts.jsonl --model 'my shards' --tp 3 -o rows.jsonl",
        "make a new one: `tpctl reshard 'my shards' --tp 3 -o FOLDER`",
    ),
    Case(
        "batch prompts.jsonl --model rank0 --tp 2 -o rows.jsonl",
        "rank0 holds rank 0 of tp 2, but all are needed; add rank 1: `tpctl shard MODEL --tp 2 --ranks 1 -o rank0`",
    ),
    # an option without its value: the help is the command's
    Case("shard model --tp", "see `tpctl shard --help`", code=2),
    Case("bench latency --tp", "see `tpctl bench latency --help`", code=2),
    # another family's source: said before its experts and heads are looked at
    Case("inspect-shards dealt --source model", "dealt is of a qwen3_moe model, but model of a llama"),
    Case("inspect-shards dealt --source model --verify", "dealt is of a qwen3_moe model, but model of a llama"),
    Case("shard model --tp 2 --revision main", "--revision main is for models on the Hub, but model is not one"),
    Case("shard model --tp 4 --ranks 2-4", "rank 4 does not exist at tp 4; ranks are 0 to 3"),
    Case("shard model --tp 4 --ranks 3-1", "'3-1' is no list of ranks; write it like 0-3 or 0,2,5-6", code=2),
    Case("shard model --tp 4 --ranks x", "'x' is no list of ranks", code=2),
    Case("shard model --tp 2 --max-part-size 0", "0 is less than a byte; write a size like 5GB", code=2),
    Case("shard model --tp 2 --max-part-size big", "'big' is no size", code=2),
    Case("shard model --tp 2 --dtype int4", "dtype 'int4' is unknown; use auto, ", code=2),
    Case("shard model --tp 2 --compat ollama", "--compat ollama is unknown; use vllm or sglang", code=2),
    Case("shard model --tp 2 -o file --force", "file is a file; choose another folder (-o)"),
    Case("shard model --tp 2 -o file/below", "file is no folder, so nothing can be made there; choose another (-o)"),
    Case("shard model --tp 2 -o home --force", "home holds no model, and --force replaces nothing else"),
    Case("shard model --tp 2 -o model --force", "model holds the source model itself; choose another folder (-o)"),
    Case(
        "shard model --tp 4 --ranks 0 -o two-of-4",
        "two-of-4 holds ranks 0, 3 of tp 4 already, and no other is asked for",
    ),
    Case("shard model --tp 2 --ranks 0 -o two-of-4", "two-of-4 holds ranks cut with tp size 4, but 2 is asked for"),
    Case(
        "shard model --tp 3 --ranks 1 -o two-of-4",
        "two-of-4 holds ranks cut with tp size 4, but 3 is asked for; use --force",
    ),
    Case("shard model --tp 2 --ranks 0 -o home", "home exists already; use --force"),
    Case("merge model -o out", "model has no tpctl.json; it is not a shard folder, make one with `tpctl shard`"),
    Case("merge nowhere -o out", "there is no folder nowhere"),
    Case(
        "merge two-of-4 -o out", "but all are needed; add ranks 1-2: `tpctl shard MODEL --tp 4 --ranks 1-2 -o two-of-4`"
    ),
    Case("merge renamed -o out", "tpctl.json was altered after it was written; shard the model again"),
    Case("merge newer -o out", "tpctl.json has format version 99, this tpctl reads version 1; shard the model again"),
    Case("merge cut -o out", "(rank 1) has 100 bytes, but"),
    Case("merge shards -o model", "model exists already; use --force"),
    Case("merge shards", "-o", code=2),
    Case("reshard two-of-4 --tp 2 -o out", "but all are needed; add ranks 1-2"),
    Case("reshard shards --tp 4 -o model", "model exists already; use --force"),
    Case(
        "reshard shards --tp 4 --ranks 0 -o shards --force",
        "shards is shards itself, which is read; choose another folder (-o)",
    ),
    Case(
        "reshard shards --tp 4 --ranks 0 -o shards",
        "shards is shards itself, which is read; choose another folder (-o)",
    ),
    Case(
        "reshard shards --tp 3 -o shards/below",
        "shards/below is inside shards, which is read; choose another folder (-o)",
    ),
    Case("merge shards -o . --force", ". holds the source shards itself; choose another folder (-o)"),
    Case("batch prompts.jsonl -o loop", "loop is a link that leads back to itself; choose another place (-o)"),
    Case("batch loop", "cannot read loop: Too many levels of symbolic links"),
    Case("shard ./loop --tp 2", "cannot look at ./loop: Too many levels of symbolic links; MODEL is"),
    Case("plan loop", "cannot look at loop: Too many levels of symbolic links; MODEL is"),
    Case("upload loop org/name", "there is no folder loop"),
    Case("inspect-shards loop", "loop/tpctl.json cannot be read: Too many levels of symbolic links"),
    Case("shard ./pipe --tp 2", "pipe is a pipe or a device, no model; MODEL is"),
    Case("inspect-shards piped", "piped/tpctl.json is a folder, a pipe or a device, not a manifest"),
    Case("merge pipes -o out", "model-rank-0-part-0.safetensors (rank 0) has 0 bytes, but"),
    Case("upload pipes org/name", "model-rank-0-part-0.safetensors is a pipe, not the file of"),
    Case("reshard shards --tp 4 --ranks 7 -o out", "rank 7 does not exist at tp 4; ranks are 0 to 3"),
    Case("reshard shards --tp 3 -o out --compat vllm", "vllm loads only even splits"),
    Case("inspect-shards shards --rank 2", "rank 2 does not exist at tp 2; ranks are 0 to 1"),
    Case("plan ./nowhere", "there is no file or folder ./nowhere"),
    Case("shard bloom --tp 2", 'model_type "bloom" is not supported; tpctl runs'),
    Case("plan bloom", 'model_type "bloom" is not supported'),
    Case("plan model --gpu-memory much", "'much' is no size", code=2),
    Case("download ./nowhere", "there is no file or folder ./nowhere"),
    Case("download model -o home", "home exists and is not empty; choose another folder or remove it"),
    Case("upload nowhere org/name", "there is no folder nowhere"),
    Case("upload empty org/name", "empty has no config.json"),
    Case("upload some org/name", "model-rank-1-part-0.safetensors is missing"),
    Case("upload shards name", "'name' is no repository name; write org/name"),
    Case(
        "shard x --tp 0",
        "'--tp': input should be greater than or equal to 1 (given: 0); see `tpctl shard --help`",
        code=2,
    ),
    Case("shard x --tp=two", "'--tp': ", code=2),
    Case("plan x --tp 0", "(given: 0)", code=2),
    Case("reshard x --tp 0 -o y", "(given: 0)", code=2),
    Case("chat x --tp 0", "(given: 0)", code=2),
    Case("batch x --tp -3", "(given: -3)", code=2),
    Case("bench throughput x --tp 0", "(given: 0); see `tpctl bench throughput --help`", code=2),
    Case("bench latency --runs 0", "'--runs'", code=2),
    Case("bench latency --sequences 1,0", "--sequences 1,0 is no list of numbers from 1 on, as 1,8,64 is", code=2),
    Case(
        "batch x --scheduling-policy sjf",
        "policy': 'sjf' is not one of 'auto', 'fcfs', 'makespan'; see `tpctl batch",
        code=2,
    ),
    Case("inspect-shards x --rank -1", "'--rank'", code=2),
    Case("plan x --max-model-len 0", "'--max-model-len'", code=2),
    Case("plan x --max-num-seqs 1.5", "(given: 1.5)", code=2),
    Case("plan x --gpu-memory-utilization 3", "(given: 3)", code=2),
    Case("plan x --gpu-memory 80", "write it with a unit, like 80GiB", code=2),
    Case("plan x --gpu-memory 80000000", "--gpu-memory 80000000 is 80.0 MB", code=2),
    Case("chat x -m hi --block-size 0", "'--block-size'", code=2),
    Case("chat x -m hi --kv-cache-memory 2", "write it with a unit, like 2GiB", code=2),
    Case("shard x --tp 2 --max-part-size 5", "write it with a unit, like 5GB", code=2),
    Case("shard x --tp 2 --ranks 3-1", "'3-1' is no list of ranks", code=2),
    Case("chat x --max-tokens 0", "--max-tokens is 0, but must be", code=2),
    Case("chat x --top-p 2", "--top-p is 2.0, but must be", code=2),
    Case("batch x --temperature -1", "--temperature is -1.0, but must be", code=2),
    Case("batch prompts.jsonl --model unrun -o rows/", "tpctl cuts but does not run yet"),
    Case("batch prompts.jsonl --model unrun -o rows.jsonl --replicas 2", "tpctl cuts but does not run yet"),
    Case("batch prompts.jsonl -o rows.jsonl --replicas two", "--replicas is two, but must be a whole number", code=2),
    Case("batch prompts.jsonl -o rows.jsonl --replicas -1", "--replicas is -1, but must be a whole number", code=2),
    Case("batch x --node-rank 1", "--node-rank is for a model over several hosts", code=2),
    Case("chat x -m hi --rdzv-endpoint a:1", "--rdzv-endpoint is for a model over several hosts", code=2),
    Case("chat x -m hi --nnodes 2 --node-rank 2 --rdzv-endpoint a:1", "must be from 0 to 1", code=2),
    Case("chat x -m hi --nnodes 2 --node-rank 0 --rdzv-endpoint a", "must be HOST:PORT", code=2),
    Case("replica x --wait -1", "'--wait'", code=2),
    Case("batch x -o rows/ --part-rows 0", "'--part-rows'", code=2),
    Case("batch x -o rows/ --gpu-hour-price -1", "'--gpu-hour-price'", code=2),
    Case("batch x -o rows/ --step-timeout 0", "'--step-timeout'", code=2),
    Case("batch model/config.json -o model/ --force", "model/config.json lies in model, where the rows go", code=2),
    Case("batch damaged.parquet -o rows/", "damaged.parquet is no Parquet file, or a damaged one: Parquet magic bytes"),
    Case(
        "batch rows.parquet -o x.jsonl --input-format jsonl",
        "rows.parquet is Parquet, and not --input-format jsonl",
        code=2,
    ),
    Case("batch prompts.jsonl -o x.parquet --output-format jsonl", "--output-format is jsonl, but x.parquet", code=2),
    Case("batch prompts.jsonl -o x.jsonl --output-format parquet", "--output-format is parquet, but x.jsonl", code=2),
    Case("batch rows.parquet --output-format parquet --prompt-column question", "Parquet is no stream; name", code=2),
    Case("batch rows.parquet -o x --prompt-column question --id-column image", "rows.parquet is binary; ids are"),
    Case("batch rows.parquet -o x/ --prompt-column question --keep-columns a,label", 'no column "a"; it has'),
    Case("batch prompts.jsonl -o x.jsonl --keep-columns a,,b", "a column's name is empty", code=2),
    Case("batch prompts.jsonl -o x.parquet --keep-columns prompt", "--keep-columns has no types to go by", code=2),
    Case("batch - -o x.parquet", "Parquet is written for what is read from a file; - is none", code=2),
    Case("batch x --input-format csv", "'csv' is not one of 'jsonl', 'openai', 'parquet'", code=2),
    Case("batch absent.jsonl -o rows/", "cannot read absent.jsonl: No such file or directory"),
    Case("batch model -o rows/", "model is a model's folder, not a file of prompts; give it with --model"),
    Case("batch pipe -o rows/", "pipe is no file, give one", code=2),
    Case("batch status nowhere", "there is no batch at nowhere"),
    Case("batch status", "issing argument 'OUTPUT'; see `tpctl batch status --help`", code=2),
    Case("replica nowhere", "nowhere holds no batch to answer lines of"),
    Case("batch x --seed -1", "--seed is -1, but must be", code=2),
    Case(
        "chat x -m hi --attention-backend flash", "'flash' is not one of 'auto', 'sdpa', 'triton', 'flash-attn'", code=2
    ),
    Case("chat x --stop=", "--stop is empty", code=2),
    Case("chat x --json-schema absent", "--json-schema: cannot read absent: No such file or directory", code=2),
    Case("batch x --json-schema mixed.jsonl", "--json-schema mixed.jsonl: the file is not valid JSON", code=2),
    Case("shard x", "issing option '--tp'; see `tpctl shard --help`", code=2),
    Case("serve x --tensor-parallel-size 2", "no such option: --tensor-parallel-size, which is --tp here; see", code=2),
    Case("chat x -tp 2", "no such option: -tp, which is --tp here; see `tpctl chat --help`", code=2),
    Case("batch x --tensor_parallel_size=2", "no such option: --tensor_parallel_size, which is --tp here", code=2),
    Case("serve --model x", "no such option: --model, which is MODEL here; see `tpctl serve --help`", code=2),
    Case("shard x --nope", "no such option: --nope", code=2),
    Case("shard model --tp 2 --ranks 2", "rank 2 does not exist at tp 2; ranks are 0 to 1"),
    Case("shard model --tp 2 -o model", "model exists already; use --force"),
    Case("shard model --tp 2 --compat x", "--compat x is unknown; use vllm or sglang", code=2),
    Case("reshard nowhere --tp 2 -o out", "there is no folder nowhere"),
]


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


def local_answer(command: str, folder: Path) -> Answer:
    """What ``tpctl COMMAND`` says in ``folder``."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["tpctl", *shlex.split(command)]),
        mock.patch("signal.signal"),
    ):
        try:
            app_module.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Answer(code, out.getvalue(), err.getvalue().replace(f"{folder.resolve()}{os.sep}", ""))


if __name__ == "__main__":
    for asked in sys.stdin:
        where, what = json.loads(asked)
        print(json.dumps(asdict(local_answer(what, Path(where)))), flush=True)
