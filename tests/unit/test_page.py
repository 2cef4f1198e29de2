"""The HTML page: whole, self-contained, small, and alive in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.unit.browser import CHROMIUM as BROWSER
from tests.unit.pictured import MOE
from tests.unit.reports import make_report, report_of
from tests.unit.shown import mixed, parallel, post_normed, scaled
from tests.unit.synthetic import RUN, make_config
from tpctl.arch.config import ModelConfig
from tpctl.arch.quantised import Cutting
from tpctl.errors import ShardFolderError
from tpctl.sharding.showing.page import render, write_page
from tpctl.sharding.showing.report import ExtraReport

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "dtype": "bfloat16",
}
NINE = make_config(num_attention_heads=9, num_key_value_heads=3, hidden_size=54, num_hidden_layers=4)
VOID = {"meta", "link", "input", "br", "img", "hr"}


class Reader(HTMLParser):
    """Checks that tags nest, and keeps ids, links and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.rects = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.rects += tag == "rect"
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def data_of(html: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize("family", RUN)
@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_every_family_has_a_whole_page(family: str, tp_size: int) -> None:
    html = render(*make_report(make_config(family, attention_bias=True), tp_size))
    reader = read(html)
    assert reader.links == [] and "{{" not in html
    assert not re.search(r"https?://(?!www\.w3\.org)", html)
    assert reader.rects > 20


def test_data_unfolds_to_every_tensor() -> None:
    report, config = make_report(NINE, 4)
    data = data_of(render(report, config))
    unfolded = {}
    for kind in data["kinds"]:
        assert len(kind["parts"]) == max(1, len(kind["layers"]))
        for layer in kind["layers"] or [None]:
            name = kind["name"] if layer is None else kind["name"].replace(".N.", f".{layer}.")
            unfolded[name] = kind
    for index, rank in enumerate(report.ranks):
        assert {tensor.name for tensor in rank.tensors} == set(unfolded)
        for tensor in rank.tensors:
            kind = unfolded[tensor.name]
            assert tuple(kind["shapes"][index]) == tensor.shape
            assert kind["bytes"][index] == tensor.nbytes


def test_figures_say_what_is_uneven_copied_and_padded() -> None:
    report, config = make_report(make_config(**{**NINE, "vocab_size": 70}), 4)
    html = render(replace(report, replicated_bytes=1000), config)
    text = " ".join(read(html).texts)
    assert "KV heads on 2 ranks" in text and "uneven" in text
    assert "rank 1 · 18 × 54 · rows q 12:18, k 0:6, v 0:6" in text
    assert "rows of zeros" in html and "rank 0, which has a copy, as 1 more" in html
    assert " 0 and 1 " in text and "piled up like cards are copies" in text
    assert "and KV heads, since there are more ranks than those" in text
    assert "all-reduce 1" in text and "all-reduce 2" in text
    assert "The split is uneven" in text


def test_what_does_not_apply_is_not_said() -> None:
    report, config = make_report(NINE, 3)
    text = " ".join(read(render(replace(report, replicated_bytes=1000), config)).texts)
    assert "1.0 kB are copies: norms, which every rank needs whole." in text
    assert "piled up like cards" not in text and "not in this folder" not in text


def test_every_lane_of_the_block_is_named() -> None:
    five, six = (" ".join(read(render(*make_report(NINE, tp_size))).texts) for tp_size in (5, 6))
    assert all(f" rank {rank} " in five for rank in range(4))
    assert "1 more rank does the same beside these" in five and "2 more ranks do the same" in six


def page_of(model: ModelConfig, tp_size: int, cutting: Cutting = Cutting()) -> str:
    html = render(report_of(model, tp_size, cutting=cutting), model)
    return " ".join(" ".join(read(html).texts).split())


def test_a_token_passes_router_and_experts() -> None:
    report, config = make_report(MOE, 2)
    html = render(report, config)
    text = " ".join(" ".join(read(html).texts).split())
    assert (
        "8 experts of which a token takes 2, in" in text and "blocks of two sorts, each an attention part and " in text
    )
    assert "Layer 0 attention over all tokens, an MLP" in text
    assert "Layers 1-2 2 of 3 blocks: attention over all tokens, 8 experts" in text
    steps = (
        "RMSNorm",
        "router",
        "w13 of an expert",
        "act(gate) · up",
        "w2 of an expert",
        "sum of experts",
        "all-reduce 2",
    )
    places = [text.index(step, text.index("Layers 1-2")) for step in steps[1:]]
    assert places == sorted(places)
    assert "512 × 256" in text and "best 2 of 8" in text and "Here every rank has a part of every expert" in text
    assert "a part of all 8" in text and "FP8 in blocks of 128 x 128" in text
    assert "w13_weight_scale_inv F32 3 × 2 + 3 × 2, 8 times for a block of 128 x 128 cut with the weight" in text
    assert "norms and routers" in " ".join(read(render(replace(report, replicated_bytes=1000), config)).texts)
    names = [kind["name"] for kind in data_of(html)["kinds"]]
    assert "model.layers.N.mlp.experts.w2_weight_scale_inv" in names


def test_dealt_experts_are_said_rank_by_rank() -> None:
    cutting = Cutting(2)
    report, config = make_report(MOE, 4, cutting=cutting)
    text = " ".join(" ".join(read(render(report, config)).texts).split())
    assert "dealt to 2 groups of 2 ranks (expert parallel)" in text
    assert "experts 0 to 3 those chosen, if any" in text and "experts 4 to 7 those chosen, if any" in text
    assert "one of experts 0 to 3: 768 rows (outputs)" in text and "4 to 7, a part of each" in text
    whole = page_of(ModelConfig.from_dict(MOE, cutting=Cutting(4)), 4, Cutting(4))
    assert "experts 6:8, each whole" in whole and "no expert is cut" in whole


def test_layers_of_many_sorts_are_drawn_once_each() -> None:
    text = page_of(mixed(), 4)
    assert "blocks of three sorts, each a part that mixes tokens and an MLP part or one of experts" in text
    for heading in (
        "Layer 0 attention over a window of 128, an MLP",
        "Layers 1-2, 4-5 4 of 6 blocks: gated delta net, 8 experts and a shared one",
        "Layer 3 attention over all tokens, 8 experts and a shared one",
    ):
        assert heading in text
    assert "A head needs no other. By head too: conv1d, A_log." in text and "Over 128 tokens." in text
    assert "all-reduce 2, of experts and the shared one" in text and "shared gate, up 64 × 256" in text
    assert "8 query and 2 KV heads or 8 heads of gated delta net" in text
    assert "heads, gated delta net" in text
    assert "128 × 256" in text  # of q, k, v: by features, whatever words they are packed in
    assert "columns (words of 8 outputs)" in text and "It is stored [inputs × outputs]." in text


def test_norms_behind_and_over_all_heads() -> None:
    text = page_of(post_normed(), 2)
    steps = (
        "qkv weight",
        "all-reduce 1, of squares",
        "attention",
        "all-reduce 2",
        "after one more RMSNorm",
        "all-reduce 3",
    )
    places = [text.index(step, text.index("hidden state 24 numbers")) for step in steps]
    assert places == sorted(places) and "only at the three bars" in text


def test_what_is_whole_on_every_rank_needs_no_exchange() -> None:
    text = page_of(scaled(), 2)
    steps = (
        *("all-reduce 1", "added to the hidden state after one more RMSNorm", "RMSNorm", "down weight", "all-reduce 2"),
        *("added to the hidden state after one more RMSNorm", "per_layer_gate", "per_layer_projection"),
        *("added to the hidden state after one more RMSNorm", "scaled by scalar", "on to the next block"),
    )
    place = text.index("hidden state 24 numbers")
    for step in steps:
        place = text.index(step, place) + 1
    assert "all-reduce 3" not in text and "only at the two bars" in text


def test_an_mlp_beside_attention_shares_its_exchange() -> None:
    text = page_of(parallel(), 2)
    assert "only at the bar named all-reduce" in text and "all-reduce 2" not in text
    assert (
        text.index("o weight") < text.index("beside that, from the same normed vector") < text.index("gate, up weight")
    )


def test_what_no_rank_holds_is_listed() -> None:
    report, config = make_report(NINE, 2)
    extra = tuple(ExtraReport(f"mtp.layers.{n}.fc.weight", "BF16", (2, 3), 12) for n in range(3))
    text = " ".join(" ".join(read(render(replace(report, extra=extra), config)).texts).split())
    assert "The checkpoint has 3 more tensors, 36 B, that no rank needs" in text
    assert "mtp.layers.N.fc.weight BF16 [2, 3] 3 36 B" in text
    assert "Beside the model" not in render(report, config)


def test_a_missing_rank_is_drawn_as_missing() -> None:
    assert "not in this folder" in render(*make_report(NINE, 3, ranks=[1]))


def test_ranks_whose_files_are_elsewhere_are_named() -> None:
    report, config = make_report(NINE, 3)
    html = render(replace(report, absent=(1, 2)), config)
    assert "The files of ranks 1-2 are not in this folder; its manifest describes them." in html


@pytest.mark.parametrize("tp_size", [8, 64])
def test_a_70b_page_stays_small(tp_size: int) -> None:
    html = render(*make_report(LLAMA_70B, tp_size))
    assert len(html.encode()) < 2_000_000
    read(html)


def test_names_cannot_break_out_of_the_page() -> None:
    report, config = make_report(NINE, 2, source="</title><script>alert(1)</script>")
    html = render(report, config)
    assert "<script>alert" not in html
    read(html)


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    report, config = make_report(NINE, 2)
    with pytest.raises(ShardFolderError, match="its folder does not exist"):
        write_page(report, config, tmp_path / "missing" / "page.html")
    manifest = tmp_path / "tpctl.json"
    manifest.write_text("{}")
    with pytest.raises(ShardFolderError, match=r"tpctl\.json exists and is no \.html file"):
        write_page(report, config, manifest)
    assert manifest.read_text() == "{}"
    for _ in range(2):
        write_page(report, config, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render(report, config)


def browse(url: str, profile: Path, *options: str) -> str:
    """What headless Chromium makes of ``url``."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", *options, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_search_works_in_a_browser(tmp_path: Path) -> None:
    report, config = make_report(LLAMA_70B, 8)
    write_page(report, config, tmp_path / "page.html")
    url = (tmp_path / "page.html").as_uri()
    everything = browse(url, tmp_path / "one", "--dump-dom")
    assert "483 of 483 tensors a rank, the first 60 shown" in everything
    names = re.findall(r"<summary>(\S+) ", everything)
    assert len(names) == 60 and names[0] == "model.embed_tokens.weight"
    assert names[1:3] == ["model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.qkv_proj.weight"]
    searched = browse(f"{url}#layers.7.%20qkv", tmp_path / "two", "--dump-dom")
    assert re.findall(r"<summary>(\S+) ", searched) == ["model.layers.7.self_attn.qkv_proj.weight"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_typing_filters_and_a_rank_is_singled_out(tmp_path: Path) -> None:
    """As a person uses it: by events, of which the page has to take notice."""
    report, config = make_report(NINE, 4)
    write_page(report, config, tmp_path / "page.html")
    script = """<script>
    const field = document.getElementById("search");
    field.value = "LAYERS.2. row";
    field.dispatchEvent(new Event("input"));
    document.querySelector("#results details").open = true;
    document.querySelectorAll(".legend button")[1].click();
    const faint = [...document.querySelectorAll("main .off")];
    document.title = `${faint.some((item) => item.dataset.r === "1")} ${faint.length > 50}`;
    </script></body>"""
    page = (tmp_path / "page.html").read_text(encoding="utf-8").replace("</body>", script)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    dom = browse((tmp_path / "page.html").as_uri(), tmp_path / "profile", "--virtual-time-budget=2000", "--dump-dom")
    assert re.findall(r"<summary>(\S+) ", dom) == [
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ]
    assert "2 of 27 tensors a rank" in dom
    assert "<td>[54, 12]</td><td>0:12</td>" in dom  # rank 0's two heads, in the table that opens under a name
    assert "<title>false true</title>" in dom


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("scheme", "ground"), [("0", (21, 24, 28)), ("1", (251, 250, 247))])
def test_the_page_follows_the_colour_scheme(tmp_path: Path, scheme: str, ground: tuple[int, int, int]) -> None:
    report, config = make_report(NINE, 4)
    write_page(report, config, tmp_path / "page.html")
    probe = "<script>document.title = getComputedStyle(document.body).backgroundColor</script></body>"
    page = (tmp_path / "page.html").read_text(encoding="utf-8").replace("</body>", probe)
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    option = f"--blink-settings=preferredColorScheme={scheme}"
    dom = browse((tmp_path / "page.html").as_uri(), tmp_path / "profile", option, "--dump-dom")
    assert f"<title>rgb{ground}</title>" in dom
