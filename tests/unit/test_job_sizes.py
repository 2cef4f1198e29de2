"""The table of docs/architecture.md that says how many lines each job takes is not far from what there is.

It may be a tenth behind, so that not every change has to touch it. To print it anew:

    python -m tests.unit.test_job_sizes
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "architecture.md"

# nano-vllm's lines, and tpctl's: files of tpctl/ in braces stand for their lines.
JOBS = {
    "scheduler": (
        "92",
        "{engine/scheduling/scheduler.py}; a step's room {engine/scheduling/step.py}, limits "
        "{engine/scheduling/limits.py}, drafts {engine/scheduling/drafting.py}, pace "
        "{engine/scheduling/pacing.py}, speculation {engine/scheduling/speculation.py}",
    ),
    "block manager": (
        "120",
        "{engine/scheduling/block_manager.py} with its integrity check; pools of several kinds of layers "
        "{engine/scheduling/slabs.py}, recurrent states {engine/scheduling/states.py}",
    ),
    "linears": (
        "156, with their loader",
        "{layers/linear.py}; `Weight`s of all formats and devices {layers/weights/*.py}",
    ),
    "sampler": (
        "12, without top-p",
        "{engine/sampling/*.py} in torch, {kernels/sampling/*.py} with Triton: exact over a divided vocabulary, "
        "penalties, log-probabilities, grammars",
    ),
    "model definition": (
        "216 a family",
        "{models/decoder.py} for all; a family's file has {arch/families/mistral3.py} to "
        "{arch/families/gpt_oss.py}, Gemma 4's {arch/families/gemma4.py}",
    ),
    "rules of a cut": ("in each loader", "{partition/*.py}, data, checked alone"),
    "loading weights": ("28", "{models/loader.py} and {models/device_loader.py} (`models/`)"),
}
_NUMBER = re.compile(r"\d[\d,]*")


def lines(pattern: str) -> int:
    files = list((ROOT / "tpctl").glob(pattern))
    assert files, pattern
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def row(job: str) -> str:
    nano, ours = JOBS[job]
    return f"| {job} | {nano} | {re.sub(r'{(.*?)}', lambda match: f'{lines(match[1]):,}', ours)} |"


@pytest.mark.parametrize("job", JOBS)
def test_the_page_is_at_most_a_tenth_behind(job: str) -> None:
    (told,) = (line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {job} |"))
    now = row(job)
    assert _NUMBER.sub("n", told) == _NUMBER.sub("n", now)
    for old, new in zip(_NUMBER.findall(told), _NUMBER.findall(now), strict=True):
        before, after = (int(number.replace(",", "")) for number in (old, new))
        assert abs(before - after) <= max(20, after // 10), f"{told}\nis now\n{now}"


if __name__ == "__main__":
    print("\n".join(map(row, JOBS)))
