"""Every link and every file that README.md, CONTRIBUTING.md, docs/ and the code's comments name is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SOURCES = [path for folder in ("tpctl", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PYTHON = re.compile(r"[\w./*{},-]*\w\.py\b")
_ADDRESS = re.compile(r"`((?:tpctl|tests|docs|examples|benchmarks|\.ci)/[\w./*{}-]*)`")
_PAGE = re.compile(r"(?<![\w/])docs/[\w/-]+\.md\b")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> frozenset[str]:
    """What GitHub names the headings of ``page``: lower case, no punctuation, hyphens for spaces, repeats numbered."""
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ (.*)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
        seen[slug] = seen.get(slug, 0) + 1
    return frozenset(found)


def broken(page: Path) -> Iterator[str]:
    """The relative links of ``page`` that lead nowhere."""
    for target in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        address, _, anchor = target.partition("#")
        aim = (page.parent / address).resolve() if address else page
        if not aim.exists() or (anchor and anchor not in anchors(aim)):
            yield target


def expanded(pattern: str) -> list[str]:
    """``a_{b,c}.py`` as the names it stands for."""
    if not (braces := re.search(r"\{([^}]*)\}", pattern)):
        return [pattern]
    return [pattern[: braces.start()] + part + pattern[braces.end() :] for part in braces[1].split(",")]


NAMES = {path.name for path in SOURCES}


def named(mention: str) -> bool:
    """Whether ``mention`` is a file or folder: by its path, by its path in ``tpctl/``, or by a source file's name."""
    for name in expanded(mention):
        if "/" not in name and "*" not in name:
            known = name in NAMES
        else:
            known = any(True for folder in (ROOT, ROOT / "tpctl") for _ in folder.glob(name.rstrip("/")))
        if not known:
            return False
    return True


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    assert not list(broken(page))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_that_pages_name_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    mentions = {*_PYTHON.findall(text), *_ADDRESS.findall(text)}
    assert not sorted(mention for mention in mentions if not named(mention))


def test_pages_that_the_code_names_are_there() -> None:
    for source in SOURCES:
        for name in _PAGE.findall(source.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{ids(source)} names {name}"


def test_the_log_lists_its_entries() -> None:
    """Each of them, newest first."""
    log = ROOT / "docs" / "log"
    listed = [link for link in _LINK.findall((log / "README.md").read_text(encoding="utf-8")) if "/" not in link]
    assert sorted(listed) == sorted(path.name for path in log.glob("*.md") if path.name != "README.md")
    dates = [name[:10] for name in listed]
    assert dates == sorted(dates, reverse=True)


def test_the_checks_check(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One, two\n## `a_b` / c\n[x](#one-two) [y](#a_b--c) [z](other.md) [w](#three) [v](https://a.b)\n")
    assert list(broken(page)) == ["other.md", "#three"]
    assert (
        named("tpctl/errors.py")
        and named("errors.py")
        and named("cli/app.py")
        and named("tests/gpu/test_{logits,kernels_*}.py")
    )
    assert not named("errors2.py") and not named("cli/errors.py") and not named(".ci/none")


_ROOMS = "|".join(sorted(path.name for path in (ROOT / "tpctl").iterdir() if (path / "__init__.py").is_file()))
_MODULE = re.compile(rf"`(?:tpctl\.)?((?:{_ROOMS})(?:\.(?!txt|json)\w+)+)`")


def is_there(address: str) -> bool:
    """Whether ``address`` is a module, or a name that its module has."""
    place, names = ROOT / "tpctl", address.split(".")
    while names and (place / names[0]).is_dir():
        place /= names.pop(0)
    if names and (file := place / f"{names[0]}.py").is_file():
        return len(names) == 1 or re.search(rf"\b{names[1]}\b", file.read_text(encoding="utf-8")) is not None
    return not names


def test_modules_that_docstrings_name_are_there() -> None:
    files = [file for folder in ("tpctl", "tests", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")]
    found = {address: file for file in files for address in _MODULE.findall(file.read_text(encoding="utf-8"))}
    assert len(found) > 10
    assert {address: file.name for address, file in found.items() if not is_there(address)} == {}


def test_names_that_contributors_are_told_are_in_the_code() -> None:
    words = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Words")[2].partition("## How")[0]
    names = set(re.findall(r"`([a-z]\w*)`", words))
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tpctl").rglob("*.py"))
    assert len(names) > 4
    assert not sorted(name for name in names if not re.search(rf"\b{name}\b", code))
