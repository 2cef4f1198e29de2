"""What a folder holds that no model folder does: somebody's own files, which ``--force`` must not take along."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from tpctl.checkpoint.folder import WEIGHT_SUFFIXES
from tpctl.errors import ShardFolderError
from tpctl.manifest.manifest import MANIFEST, Manifest

_KNOWN = re.compile(
    r"""\.(DS_Store|gitattributes|gitignore|cache)
    | (.+\.)?index\.json | (.+_)?config\.json | (.+\.)?(jinja|tiktoken|spm|bpe)
    | tpctl\.json | tokenizer[\w.-]*\.(json|model) | [\w.-]+\.model | vocab\.(json|txt) | merges\.txt
    | (added_tokens|special_tokens_map|chat_template|params|modules)\.json
    | (modeling|configuration|tokenization|processing|image_processing|modular)_\w+\.py | __init__\.py
    | (README|LICEN[CS]E|NOTICE|COPYING|USE_POLICY|CHANGELOG|MODEL_CARD|ATTRIBUTIONS?)([-_.].*)?""",
    re.VERBOSE | re.IGNORECASE,
)
"""Names of what comes beside a model's weights."""


def foreign_file(folder: Path) -> str | None:
    """The name of something in ``folder`` that its manifest does not list and that comes with no model."""
    listed: set[str] = set()
    if (folder / MANIFEST).is_file():
        with suppress(ShardFolderError):  # a damaged one is replaced like any other
            listed = set(Manifest.load(folder).files)
    for path in sorted(folder.iterdir()):
        if path.name in listed or _KNOWN.fullmatch(path.name):
            continue
        if path.suffix.lower() not in WEIGHT_SUFFIXES or path.is_dir():
            return path.name
    return None
