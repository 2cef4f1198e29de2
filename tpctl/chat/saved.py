"""A conversation as a file: JSON that ``/save`` writes and ``/load`` reads back, strictly.

{"format": "tpctl-chat-1", "model": "demo", "system": null, "sampling": {"temperature": 0.7}, "stop": [],
 "messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpctl.errors import OutputError, RequestError, shown

FORMAT = "tpctl-chat-1"
_THOUGHT = "reasoning_content"
_LARGEST = 64 << 20  # bytes of a file


@dataclass(frozen=True)
class SavedChat:
    """What a conversation consists of.

    ``messages`` are the user's and the model's in turn, beginning with the user's; the model's may have its thoughts
    as ``reasoning_content``. ``sampling`` holds fields of ``SamplingParams``.
    """

    model: str
    system: str | None
    sampling: Mapping[str, Any]
    stop: list[str]
    messages: list[dict[str, str]]

    def save(self, file: Path, *, force: bool = False) -> None:
        """Write it: wholly, or not at all.

        Raises:
            OutputError: the file exists and is not to be replaced, or cannot be written.
        """
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"
        _refuse_no_file(file)
        try:
            if not force and os.path.lexists(file):
                raise OutputError(f"{file} exists already; /save --force {file} replaces it")
            target = file.resolve() if file.is_symlink() else file
            descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
                _move(Path(name), target, force)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except FileExistsError:
            raise OutputError(f"{file} exists already; /save --force {file} replaces it") from None
        except UnicodeEncodeError:
            raise OutputError("the conversation holds half of a surrogate pair, which no file can; /reset") from None
        except (OSError, RuntimeError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise OutputError(f"cannot write {file}: {why}; name a file in a folder where you may write") from None

    @classmethod
    def load(cls, file: Path) -> SavedChat:
        """Read what ``save`` wrote.

        Raises:
            RequestError: the file cannot be read, or holds anything else.
        """
        try:
            if not stat.S_ISREG(file.stat().st_mode):
                raise RequestError(f"{file} is no regular file; name one that /save wrote")
            if (size := file.stat().st_size) > _LARGEST:
                raise RequestError(f"{file} has {size} bytes, but a saved chat at most {_LARGEST}")
            value = json.loads(file.read_bytes())
        except OSError as error:
            raise RequestError(f"cannot read {file}: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise RequestError(f"{file} is no saved chat: not JSON ({what})") from None
        try:
            return cls._of(value)
        except ValueError as error:
            raise RequestError(f"{file} is no saved chat: {error}") from None

    @classmethod
    def _of(cls, value: Any) -> SavedChat:
        if not isinstance(value, dict):
            raise ValueError(f"it holds {shown(value)}, but must hold an object")
        if value.get("format") != FORMAT:
            raise ValueError(f'its "format" must be "{FORMAT}", not {shown(value.get("format"))}')
        wanted = {"format", *cls.__dataclass_fields__}
        if wrong := sorted(wanted ^ value.keys()):
            raise ValueError(f"the field {shown(wrong[0])} {'is missing' if wrong[0] in wanted else 'is unknown'}")
        for name, kinds in (("model", str), ("system", str | None), ("sampling", dict), ("stop", list)):
            if not isinstance(value[name], kinds):
                raise ValueError(f'"{name}" is {shown(value[name])}')
        if bad := [text for text in value["stop"] if not isinstance(text, str) or not text]:
            raise ValueError(f'"stop" holds {shown(bad[0])}, but must hold texts that are not empty')
        if not isinstance(value["messages"], list) or len(value["messages"]) % 2:
            raise ValueError('"messages" must be a list of pairs: what was said, and its answer')
        for number, message in enumerate(value["messages"]):
            role = ("user", "assistant")[number % 2]
            thought = {_THOUGHT} if role == "assistant" else set()
            whole = isinstance(message, dict) and message.keys() - thought == {"role", "content"}
            if not whole or message["role"] != role or not isinstance(message["content"], str):
                raise ValueError(f"message {number + 1} must have the role {role} and a text as its content")
            if not isinstance(message.get(_THOUGHT, ""), str):
                raise ValueError(f'message {number + 1} has {shown(message[_THOUGHT])} as its "{_THOUGHT}"')
        return cls(**{name: value[name] for name in cls.__dataclass_fields__})


def _refuse_no_file(file: Path) -> None:
    """Raise ``OutputError`` where something is that no file can replace."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OutputError(f"{file} is a link that leads back to itself; name another file") from None
        return
    if stat.S_ISDIR(mode):
        raise OutputError(f"{file} is a folder; name a file in it, as {file / 'chat.json'}")
    if not stat.S_ISREG(mode):
        raise OutputError(f"{file} is a pipe or a device; name a file")


def _move(file: Path, target: Path, force: bool) -> None:
    """Give ``file`` the name ``target``; without ``force`` not over what may have appeared there since."""
    if not force:
        try:
            os.link(file, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            pass
        else:
            file.unlink()
            return
    file.replace(target)
