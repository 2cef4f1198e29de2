"""Sections of the page: what is said of a model in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from tpctl.arch.block import Attention, Mixer, linears
from tpctl.arch.blueprint import Blueprint
from tpctl.errors import format_bytes, printable
from tpctl.manifest.manifest import describe_ranks
from tpctl.partition.split import Rule
from tpctl.sharding.showing.extra import apart
from tpctl.sharding.showing.kinds import Kind, count
from tpctl.sharding.showing.page_flow import experts_in
from tpctl.sharding.showing.page_svg import figure
from tpctl.sharding.showing.report import InspectReport
from tpctl.sharding.showing.rules import entry, paragraph, where
from tpctl.sharding.showing.steps import keeps_by_head
from tpctl.sharding.showing.svg import hue


def mixers_of(blueprint: Blueprint) -> dict[str, Attention | Mixer]:
    """One mixer of each sort that deals other heads, by what it is called."""
    found: dict[tuple[str, int, int], Attention | Mixer] = {}
    for layer in blueprint.layers:
        mixer = layer.mixer
        found.setdefault((_name_of(mixer), mixer.num_heads, mixer.num_kv_heads), mixer)
    return {
        name + (f" of {heads}" if [one[0] for one in found].count(name) > 1 else ""): mixer
        for (name, heads, _), mixer in found.items()
    }


def _name_of(mixer: Attention | Mixer) -> str:
    return mixer.kind if isinstance(mixer, Mixer) else ""


def heads_of(mixers: Mapping[str, Attention | Mixer]) -> str:
    """``"32 query and 8 KV heads"``, of each sort of mixer."""
    found = []
    for mixer in mixers.values():
        kept = keeps_by_head(mixer)
        kv = f" and {mixer.num_kv_heads} KV" if kept else ""
        query = f"{mixer.num_heads} query" if kept else f"{mixer.num_heads}"
        of = f" of {mixer.kind}" if isinstance(mixer, Mixer) else ""
        found.append(f"{query}{kv} heads{of}")
    return " or ".join(found)


def experts_of(blueprint: Blueprint) -> str:
    mixtures = {(part.count, part.per_token) for layer in blueprint.layers for part in experts_in(layer)}
    return "".join(f", {count} experts of which a token takes {taken}" for count, taken in sorted(mixtures))


def more(blueprint: Blueprint, report: InspectReport) -> str:
    """Paragraphs about what only some models have."""
    said = []
    if any(True for layer in blueprint.layers for _ in experts_in(layer)):
        said.append(_EXPERTS)
        groups, per_group = report.expert_parallel, report.tp_size // report.expert_parallel
        if groups == 1:
            said.append(_WITHIN)
        elif per_group == 1:
            said.append(_DEALT)
        else:
            said.append(_BOTH.format(groups=groups, ranks=per_group))
    if any(not one.storage.is_dense for layer in blueprint.layers for part in layer.parts for one in linears(part)):
        said.append(_QUANTISED)
    return "".join(f"<p>{text}</p>" for text in said)


_EXPERTS = (
    "Where a layer has <em>experts</em>, these are many small MLPs in place of one. For each token a router scores all "
    "of them, and the token goes through those with the best scores alone; their outputs are added, each times its "
    "score. So all experts have to be in memory, but few of them are read for a token."
)
_WITHIN = (
    "Here every rank has a part of every expert, cut as an MLP is: whichever experts tokens choose, all ranks have as "
    "much to do."
)
_DEALT = (
    "Here whole experts are dealt to the ranks (expert parallel): a rank works on the tokens that chose experts of its "
    "own, so ranks have as much to do as tokens happen to choose them."
)
_BOTH = (
    "Here whole experts are dealt to {groups} groups of {ranks} ranks (expert parallel), and the ranks of a group "
    "divide each of theirs: a group works on the tokens that chose its experts."
)
_QUANTISED = (
    "Weights of this model are quantised: beside the values, of few bits each, there are scales, by which groups of "
    "them are multiplied. They are cut with the weight that they belong to. A scale whose values are on two ranks is "
    "on both."
)


def balance(report: InspectReport, found: Sequence[Kind]) -> str:
    lines = []
    if report.imbalance > 1.005:
        lines.append(
            f"The split is uneven: the largest rank holds {report.imbalance - 1:.1%} more than the mean. All "
            "ranks wait for it in every step, which is what an uneven split costs; it is often still far better than "
            "not using the other devices."
        )
    elif report.tp_size > 1:
        lines.append("The split is even: every rank holds the same amount and none waits for another.")
    if report.replicated_bytes:
        whole = [kind for kind in found if kind.rule == Rule.REPLICATED]
        matrices = any(len(kind.inner[0]) > 1 for kind in whole)
        routers = " and routers" if matrices and any(kind.experts for kind in found) else ""
        weights = " and small weights" if matrices and not routers else ""
        kv = ", and KV heads, since there are more ranks than those" if any(kind.copied for kind in found) else ""
        scales = ", and scales of what a border divides" if any(kind.shared[0] for kind in _beside(found)) else ""
        lines.append(
            f"{format_bytes(report.replicated_bytes)} are copies: norms{routers}{weights}, which every rank needs "
            f"whole{kv}{scales}."
        )
    if report.absent:
        lines.append(
            f"The files of {describe_ranks(report.absent)} are not in this folder; its manifest describes them."
        )
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _beside(found: Sequence[Kind]) -> list[Kind]:
    return [other for kind in found for other in kind.beside if other.cut]


def columns(mixers: Mapping[str, Attention | Mixer], found: Sequence[Kind]) -> list[str]:
    """Titles of what each rank has of heads and experts."""
    titles = []
    for name, mixer in mixers.items():
        kv = ", query / KV" if keeps_by_head(mixer) else ""
        titles.append(f"heads{name if name.startswith(' ') else f', {name}' if name else ''}{kv}")
    return [*titles, *(["experts"] if any(kind.experts for kind in found) else [])]


def rank_rows(report: InspectReport, found: Sequence[Kind], mixers: Mapping[str, Attention | Mixer]) -> str:
    largest = max(rank.nbytes for rank in report.ranks)
    shares = [mixer.shares(report.tp_size) for mixer in mixers.values()]
    mixture = next((kind for kind in found if kind.experts and kind.rule != Rule.REPLICATED), None)
    rows = []
    for index, rank in enumerate(report.ranks):
        width = 100 * rank.nbytes / largest
        held = []
        for mixer, share in zip(mixers.values(), shares, strict=True):
            query, kv = len(share[rank.rank].query), len(share[rank.rank].kv)
            held.append(f"{query} / {kv}" if keeps_by_head(mixer) else f"{query}")
        if mixture is not None:
            first, stop = mixture.held[index]
            held.append(f"{first} to {stop - 1}" if mixture.dealt else f"a part of all {mixture.count}")
            held[-1] += ", a part of each" if mixture.dealt and mixture.cut else ""
        rows.append(
            f"<tr><td><span class='chip'{colour(rank.rank)}>{rank.rank}</span></td><td>{rank.parameters:,}</td>"
            f"<td>{format_bytes(rank.nbytes)}</td>"
            f"<td class='meter'><i{colour(rank.rank, f'width:{width:.1f}%')}></i></td>"
            f"{''.join(f'<td>{one}</td>' for one in held)}<td>{len(rank.files)}</td></tr>"
        )
    return "".join(rows)


def kind_figure(kind: Kind) -> str:
    tags = [f"<span class='tag'>{escape(kind.rule)}</span>"]
    if layers := count(kind.layers):
        tags.append(f"<span class='tag'>{layers}</span>")
    if kind.experts:
        tags.append(f"<span class='tag'>{kind.count} experts</span>")
    if kind.beside or kind.holds:
        tags.append(f"<span class='tag'>{escape(kind.format)}</span>")
    if kind.uneven:
        tags.append("<span class='tag mark'>uneven</span>")
    explained = paragraph(kind)
    if kind.copied:
        explained += " There are fewer KV heads than ranks: piled up like cards are copies, each of them whole."
        tags.append(f"<span class='tag mark'>KV heads on {kind.copies} ranks</span>")
    return (
        f"<figure class='kind'><div class='head'><h3>{escape(kind.name)}</h3>{' '.join(tags)}</div>"
        f"<div><p>{escape(explained)}</p><div class='scroll'>{figure(kind)}</div>{_stored_as(kind)}</div></figure>"
    )


def _stored_as(kind: Kind) -> str:
    """The tensors that a quantised weight is stored as: a line for each."""
    if not kind.beside and not kind.holds:
        return ""
    rows = []
    for one in (kind, *kind.beside):
        whole = " + ".join(" × ".join(f"{size:,}" for size in source.shape) for source in one.sources)
        times = f", {one.count} times" if one.experts else ""
        means = entry(one.holds).removeprefix("an entry ").replace("one for", "for") if one.holds else "is a value"
        place = "in the figure" if one is kind else ", ".join(where(one))
        cells = (one.short.rpartition(".")[2], one.dtype, f"{whole}{times}", means, place)
        rows.append(cells)
    return _table(("stored as", "dtype", "whole", "an entry", "on the ranks"), rows)


def extra(report: InspectReport) -> str:
    """What no rank holds, as a section of its own."""
    if not report.extra:
        return ""
    total = format_bytes(sum(one.nbytes for one in report.extra))
    rows = []
    for group in apart(report.extra):
        cells = (group.name, group.dtype, group.shape, f"{group.count:,}", format_bytes(group.nbytes))
        rows.append(cells)
    return (
        f"<section><h2>Beside the model</h2><p>The checkpoint has {len(report.extra):,} more tensors, {total}, that no "
        "rank needs: they are in a file of their own, and <code>tpctl merge</code> gives them back.</p>"
        f"{_table(('name', 'dtype', 'shape', 'tensors', 'bytes'), rows)}</section>"
    )


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Words in a table that scrolls where it is too wide."""
    head = "".join(f"<th>{title}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{escape(printable(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='scroll'><table class='words'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def colour(rank: int, style: str = "") -> str:
    """A rank's colour, for an element."""
    return f' data-r="{rank}" style="--h:{hue(rank)};{style}"'
