"""Kernels compiled before they are launched, for a device that need not be here.

Triton compiles a kernel when it is first launched with arguments of new types, and a launcher for it with the C
compiler: a second or more each, one after the other, and then keeps them in a cache on disk. Here a thread makes the
calls that launch kernels and none is launched (``unlaunched``); what each would have been compiled for is noted as
Triton hands it to its compiler, and any process can compile that into the same cache (``compile_spec``), where the
launch finds it.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import threading
from base64 import b32encode, b64decode, b64encode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tpctl.kernels.common.launch import DeviceFacts

_WITHOUT = ImportError, OSError, RuntimeError, AssertionError, CalledProcessError
"""What is raised without a C compiler, or the driver's library."""
_KILLED = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP
"""Signals that end a program for what others want or need, memory above all."""


@dataclass(frozen=True)
class KernelSpec:
    """A kernel, and what Triton compiles it for.

    Attributes:
        module, name: where it is found.
        signature: its arguments' types: one launcher serves all kernels that have the same.
        rest: constants, alignment and options.
        pickled: both, as ``JITFunction._do_compile`` takes them, in base64. Not JSON, which Triton offers: a constant
            that is a tuple becomes a list there, whose name in the cache is another.
    """

    module: str
    name: str
    signature: str
    rest: str
    pickled: str = field(compare=False, repr=False)

    @classmethod
    def of(cls, kernel: Any, signature: Any, constants: Any, options: Any, attributes: Any) -> KernelSpec:
        rest = sorted(constants.items()), sorted(attributes.items()), sorted(vars(options).items())
        parts = pickle.dumps((signature, constants, options, attributes))
        module, name = kernel.fn.__module__, kernel.fn.__name__
        return cls(module, name, repr(list(signature.items())), repr(rest), b64encode(parts).decode())

    def parts(self) -> tuple[Any, Any, Any, Any]:
        """Signature, constants, options and attributes."""
        parts: tuple[Any, Any, Any, Any] = pickle.loads(b64decode(self.pickled))
        return parts


class _Device:
    """What Triton asks of a driver to compile, for a device that is not here."""

    def __init__(self, facts: DeviceFacts) -> None:
        self.target = GPUTarget("cuda", facts.capability[0] * 10 + facts.capability[1], 32)
        self.utils = SimpleNamespace(launch=None)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class _Argument:
    """A tensor without memory, as Triton looks at one: its dtype, and how it is aligned where its memory is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


def compile_for(facts: DeviceFacts) -> None:
    """Have this process compile for a device of these facts and launch nothing from now on."""
    triton.runtime.driver.set_active(_Device(facts))


@contextmanager
def unlaunched(specs: dict[KernelSpec, None]) -> Iterator[None]:
    """In this thread kernels are added to ``specs``, in order, where they would be launched, but for those that the
    process has compiled before. Tensors may be on the meta device."""
    run, compile, mine = JITFunction.run, JITFunction._do_compile, threading.get_ident()

    def note(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, warmup: Any
    ) -> Any:
        if threading.get_ident() != mine:
            return compile(self, key, signature, device, constants, options, attrs, warmup)
        specs[KernelSpec.of(self, signature, constants, options, attrs)] = None
        return None  # then it is not launched

    def described(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        if threading.get_ident() != mine:
            return run(self, *args, grid=grid, warmup=warmup, **more)
        known = [_Argument(one) if isinstance(one, torch.Tensor) and one.is_meta else one for one in args]
        return run(self, *known, grid=grid, warmup=True, **more)

    JITFunction._do_compile, JITFunction.run = note, described
    try:
        yield
    finally:
        JITFunction._do_compile, JITFunction.run = compile, run


def was_killed(failed: BaseException | None) -> bool:
    """Whether a compilation ``failed`` since a program that it ran, the assembler or the C compiler, was ended from
    outside: as it runs by itself, or in a shell, which adds 128 to a signal's number."""
    while failed is not None:
        if isinstance(failed, CalledProcessError) and (
            -failed.returncode in _KILLED or failed.returncode - 128 in _KILLED
        ):
            return True
        failed = failed.__cause__ or failed.__context__
    return False


@contextmanager
def _as_far_as_there_is_a_compiler() -> Iterator[None]:
    """Without a C compiler, or the driver's library, the first launch will say so."""
    try:
        yield
    except _WITHOUT as failed:
        if was_killed(failed):
            raise


def compile_driver() -> None:
    """Compile what Triton loads and launches kernels with into its cache, if it is not there."""
    with _as_far_as_there_is_a_compiler():
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()


def compile_spec(spec: KernelSpec, *, launcher: bool = True) -> str:
    """Compile a kernel into Triton's cache, if it is not there, and with ``launcher`` what launches it: the same for
    all of its specs with one signature; the name of its folder there, empty where that is not on this disk. Raises
    whatever Triton does."""
    kernel, (signature, constants, options, attributes) = _kernel(spec), spec.parts()
    compiled: Any = kernel._do_compile("", signature, 0, constants, options, attributes, warmup=True)
    if launcher:
        with _as_far_as_there_is_a_compiler():
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(compiled.src, compiled.metadata)
    folder = b32encode(bytes.fromhex(compiled.hash)).decode().rstrip("=")
    return folder if (Path(triton.knobs.cache.dir) / folder).is_dir() else ""


class Compiled:
    """Notes of what has been compiled into Triton's cache, kept in a folder of that: files, named by digests, with the
    names of what must still be there, in the cache or among the notes.

    Raises:
        OSError: they cannot be written.
    """

    def __init__(self) -> None:
        self._cache = Path(triton.knobs.cache.dir)
        self.folder = self._cache / "tpctl-ahead"
        self.folder.mkdir(parents=True, exist_ok=True)

    def digest(self, spec: KernelSpec) -> str:
        """Of a kernel, its source and what else it is compiled from."""
        return f"kernel-{digest([spec, _kernel(spec).cache_key])}"

    def __contains__(self, name: str) -> bool:
        """Whether it was noted, and nothing that it stands for has been deleted since."""
        try:
            needed = (self.folder / name).read_text(encoding="ascii").split()
        except (OSError, UnicodeDecodeError):
            return False
        return all(one in self if one.startswith("kernel-") else (self._cache / one).is_dir() for one in needed)

    def __len__(self) -> int:
        return sum(1 for _ in self.folder.iterdir())

    def add(self, name: str, needed: Iterable[str] = ()) -> None:
        """Note it, at once or not at all: others may look meanwhile."""
        part = self.folder / f"{name}.{os.getpid()}"
        part.write_text("\n".join(needed), encoding="ascii")
        part.replace(self.folder / name)


def digest(parts: Iterable[object]) -> str:
    """Of ``parts`` by their representations, and of the Triton that compiles here."""
    env = sorted(get_cache_invalidating_env_vars().items())
    return blake2b(repr([*parts, triton.__version__, env]).encode(), digest_size=16).hexdigest()


def _kernel(spec: KernelSpec) -> Any:
    return getattr(importlib.import_module(spec.module), spec.name)
