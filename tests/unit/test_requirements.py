"""Versions of packages whose behaviour is relied on are bounded above, alike wherever they are asked for."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BOUNDED = ("uvicorn", "h11", "starlette", "msgspec", "prometheus-client", "llguidance")


def asked() -> dict[str, set[str]]:
    """What each package is asked for as, anywhere."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for text in texts:
            found[Requirement(text).name].add(text)
    return found


def test_a_package_is_asked_for_alike_everywhere() -> None:
    assert {name: texts for name, texts in asked().items() if len(texts) > 1} == {}


@pytest.mark.parametrize("name", BOUNDED)
def test_what_a_server_is_made_of_is_bounded_and_what_is_tested_lies_within(name: str) -> None:
    (text,) = asked()[name]
    bounds = Requirement(text).specifier
    assert {bound.operator for bound in bounds} == {">=", "<"}
    assert bounds.contains(metadata.version(name))
