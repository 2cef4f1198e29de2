"""``.ci/subjects``: long commit subjects after the base fail, those before it and cut histories do not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHECK = Path(__file__).parent.parent.parent / ".ci" / "subjects"

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def check(folder: Path, base: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CHECK, base], cwd=folder, capture_output=True, text=True)


def commit(folder: Path, subject: str) -> str:
    git(
        folder,
        "commit",
        "--quiet",
        "--allow-empty",
        "-m",
        f"{subject}\n\nA body may have lines of any length. {'x' * 90}",
    )
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def history(tmp_path: Path) -> Path:
    folder = tmp_path / "history"
    folder.mkdir()
    git(folder, "init", "--quiet")
    return folder


def test_subjects_of_up_to_72_characters_pass_and_older_ones_are_exempt(history: Path) -> None:
    base = commit(history, "x" * 100)
    commit(history, "…" * 72)
    done = check(history, base)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_longer_subject_fails(history: Path) -> None:
    base = commit(history, "first")
    long = commit(history, "x" * 73)
    commit(history, "short")
    done = check(history, base)
    assert done.returncode == 1
    assert done.stderr == f"{long[:12]} has a subject of 73 characters, 72 at most: {'x' * 73}\n"


def test_a_shallow_clone_passes(history: Path, tmp_path: Path) -> None:
    base = commit(history, "first")
    commit(history, "x" * 100)
    git(tmp_path, "clone", "--quiet", "--depth", "1", history.as_uri(), "shallow")
    done = check(tmp_path / "shallow", base)
    assert done.returncode == 0
    assert done.stdout == f"commit subjects: not checked, the history does not reach back to {base[:12]}\n"
