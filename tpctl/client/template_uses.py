"""What a chat template reads, found in its syntax tree: so that nothing a user gives is dropped without a word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import meta, nodes

_WHOLE = frozenset({"tojson", "string", "list", "items", "dictsort", "pprint", "xmlattr", "join"})
"""Filters that show everything a message holds."""


def uses(tree: nodes.Template) -> dict[str, Any]:
    """What is read.

    Returns:
        ``variables``: names that somebody must give; ``names``: of fields, and all other texts in expressions, one of
        which may name a field; ``whole``: whether messages are shown with all their fields; ``text_arguments``: whether
        a tool's arguments are asked for being a text.
    """
    tests = [test.node for test in tree.find_all(nodes.Test) if test.name == "string"]
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    names |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    names |= {keyword.key for keyword in tree.find_all(nodes.Keyword)}
    return {
        "variables": sorted(meta.find_undeclared_variables(tree)),
        "names": sorted(names),
        "whole": _shows_whole(tree, _messages(tree)),
        "text_arguments": any("arguments" in str(node) for node in tests),
    }


def _messages(tree: nodes.Template) -> set[str]:
    """Variables that may hold messages: what comes of ``messages`` by assignments, loops and calls of macros."""
    found = {"messages"}
    while True:
        more: set[str] = set()
        bound: list[tuple[nodes.Node, nodes.Node]] = [(node.target, node.node) for node in tree.find_all(nodes.Assign)]
        bound += [(loop.target, loop.iter) for loop in tree.find_all(nodes.For)]
        for target, value in bound:
            if found & _bases(value):
                names = [target] if isinstance(target, nodes.Name) else target.find_all(nodes.Name)
                more |= {name.name for name in names}
        for call in tree.find_all(nodes.Call):
            if any(found & _bases(argument) for argument in [*call.args, *(pair.value for pair in call.kwargs)]):
                more |= {name.name for macro in tree.find_all(nodes.Macro) for name in macro.args}
        if more <= found:
            return found
        found |= more


def _bases(node: nodes.Node) -> set[str]:
    """Names whose value an expression may be, or be a part of that is no single field."""
    if isinstance(node, nodes.Name):
        return {node.name}
    if isinstance(node, nodes.Getitem):
        by_name = isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str)
        return set() if by_name else _bases(node.node)
    if isinstance(node, nodes.Filter):
        return _bases(node.node) if node.node is not None else set()
    if isinstance(node, nodes.CondExpr):
        return _bases(node.expr1) | (_bases(node.expr2) if node.expr2 is not None else set())
    if isinstance(node, nodes.BinExpr):
        return _bases(node.left) | _bases(node.right)
    if isinstance(node, nodes.List | nodes.Tuple):
        return {name for item in node.items for name in _bases(item)}
    return set()


def _shows_whole(tree: nodes.Template, messages: set[str]) -> bool:
    return any(messages & _bases(node) for node in _shown(tree))


def _shown(tree: nodes.Template) -> Iterator[nodes.Node]:
    """Expressions that are shown, or gone through, as they are."""
    for node in tree.find_all(nodes.Filter):
        if node.name in _WHOLE and node.node is not None:
            yield node.node
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in ("items", "values"):
            yield call.node.node
    for output in tree.find_all(nodes.Output):
        yield from (node for node in output.nodes if isinstance(node, nodes.Name))
