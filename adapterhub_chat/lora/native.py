"""C++ kernels (`native.cpp`) for the small products of a decoding step on a CPU, where there is a compiler.

Each torch call costs some microseconds, and torch's batched products read an adapter's factors at a third of
the memory bandwidth; these kernels read them once. They are compiled for this processor on first use (a
second or two) and cached in the cache folder. Without a compiler, on other devices and for other dtypes torch
does the same work more slowly. ADAPTERHUB_NATIVE=0 turns them off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterhub_chat.files import replaced_file
from adapterhub_chat.lora.bank import Bank
from adapterhub_chat.lora.processor import cpu_fields
from adapterhub_chat.lora.weights import AdapterWeights

SOURCE, TILES = (Path(__file__).with_name(name) for name in ("native.cpp", "native_tiles.h"))
FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-Wno-psabi"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
MAX_HEAD_WIDTH = 256

log = logging.getLogger("adapterhub_chat")


class _SiteStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("members", "rank", "in_", "out", "a_at")),
        ("b_at", ctypes.c_void_p),
        ("outs", ctypes.c_void_p),
    )


class _EntriesStruct(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "starts", "rows", "weights", "low")),
    )


class _StepStruct(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int64) for n in ("rows", "heads", "kv_heads", "width", "capacity")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "positions", "scores")),
    )


def available(device: torch.device, dtype: torch.dtype, folder: Path) -> bool:
    """Return whether the native kernels support this device and dtype; `folder` caches the library."""
    return device.type == "cpu" and dtype in SUFFIX and library(folder) is not None


@functools.cache
def library(folder: Path) -> ctypes.CDLL | None:
    """Return the compiled library, from `folder` or compiled now; None where that is not possible."""
    compiler = _compiler()
    if os.environ.get("ADAPTERHUB_NATIVE") == "0" or not compiler:
        return None
    path = _path(folder, *compiler)
    try:
        if not path.is_file():
            _compile([*compiler, *FLAGS], path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        log.info("native products are not used: %s", error)
        return None


def compiled(folder: Path) -> bool:
    """Return whether the library is compiled already, so that using it does not wait for a compiler."""
    compiler = _compiler()
    return bool(compiler) and _path(folder, *compiler).is_file() and library(folder) is not None


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or _find_compiler(os.environ.get("PATH", ""))


@functools.cache
def _find_compiler(path: str) -> list[str]:
    return [name for name in ("c++", "g++", "clang++") if shutil.which(name, path=path)][:1]


@functools.cache
def _path(folder: Path, *compiler: str) -> Path:
    parts = SOURCE.read_bytes() + TILES.read_bytes()
    key = hashlib.sha256(parts + " ".join([*compiler, *FLAGS, _processor()]).encode())
    return folder / f"native-{key.hexdigest()[:16]}.so"


def _compile(command: Sequence[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as scratch:
        subprocess.run(
            [*command, str(SOURCE), "-o", str(scratch)],
            check=True,
            capture_output=True,
            timeout=120,
        )


def _processor() -> str:
    """Return what `-march=native` depends on."""
    fields = cpu_fields()
    flags = fields.get("flags") or fields.get("Features", "")
    return flags if fields else platform.machine() + platform.processor()


def write(folder: Path, bank: Bank, slot: int, weights: AdapterWeights) -> None:
    """Write an adapter into a slot of a bank, like `Bank.write`, by one native call where possible.

    On another device the whole slot is copied at once, since hundreds of small copies would be slow.
    """
    if bank.device.type != "cpu" and not bank.trainable:
        _write_through_host(folder, bank, slot, weights)
        return
    usable = not bank.trainable and bank.dtype in SUFFIX
    addresses = weights.addresses(bank.dtype) if usable else None
    if addresses is None or not compiled(folder):
        bank.write(slot, weights)
        return
    if weights.num_parameters < bank.flat.shape[1]:
        bank.flat[slot].zero_()
    size = bank.flat.element_size()
    start = bank.flat.data_ptr() + slot * bank.flat.stride(0) * size
    parts, scales = [], []
    for (module, (a, b)), (source_a, source_b) in zip(
        weights.shapes.items(), addresses, strict=True
    ):
        target_a, target_b = bank.offsets[module]
        parts += [
            source_a,
            start + target_a * size,
            *a,
            0,
            source_b,
            start + target_b * size,
            *b,
            1,
        ]
        scales += [1.0, weights.scale(module)]
    call = getattr(library(folder), f"fill_{SUFFIX[bank.dtype]}")
    call(_array(parts, ctypes.c_int64), _array(scales, ctypes.c_float), _int(len(scales)))
    bank.write_head(slot, weights.head)


def _write_through_host(folder: Path, bank: Bank, slot: int, weights: AdapterWeights) -> None:
    """Assemble a slot in a bank on the CPU, and copy it to the bank's device at once."""
    host_bank = bank.host_copy()
    write(folder, host_bank, 0, weights)
    bank.flat[slot].copy_(host_bank.flat[0])
    bank.labels[slot] = host_bank.labels[0]


class Sites:
    """Offsets of every site's factors in a slot of one layout."""

    def __init__(self, bank: Bank) -> None:
        """Read the offsets from a bank; banks with the same sites and rank share them."""
        self._keepalive: list[Any] = []
        self.widest = max((len(s.members) * bank.rank for s in bank.sites.values()), default=0)
        self.by_name = {name: self._site(bank, name) for name in bank.sites}

    def _site(self, bank: Bank, name: str) -> Any:
        site, size, base = bank.sites[name], bank.flat.element_size(), bank.flat.data_ptr()
        b_at = _array([(bank.B[m].data_ptr() - base) // size for m in site.members], ctypes.c_int64)
        outs = _array(site.out_features, ctypes.c_int64)
        a_at = (bank.A[name].data_ptr() - base) // size
        sizes = (len(site.members), bank.rank, site.in_features, sum(site.out_features), a_at)
        struct = _SiteStruct(*sizes, ctypes.addressof(b_at), ctypes.addressof(outs))
        self._keepalive += [b_at, outs, struct]
        return ctypes.byref(struct)


class Entries:
    """The rows and weights of each slot in use, for all sites of one layout."""

    def __init__(
        self, places: Sequence[tuple[Bank, int]], mix: Tensor, sites: Sites, *, many: bool = False
    ) -> None:
        """Prepare `mix` (N, G), the weight of each place in every row; `many`: several rows per place."""
        self._many = many
        pointers = [bank.flat[slot].data_ptr() for bank, slot in places]
        is_used = mix.T != 0
        group, rows = is_used.nonzero(as_tuple=True)
        counts = torch.bincount(group, minlength=len(places)).cumsum(0)
        self._sites = sites
        self._keepalive = (
            _array(pointers, ctypes.c_void_p),
            torch.cat([counts.new_zeros(1), counts]),
            rows.contiguous(),
            mix.T[is_used].float().contiguous(),
            torch.empty(len(rows) * sites.widest),
        )
        slots, *tensors = self._keepalive
        self._struct = _EntriesStruct(
            len(places), ctypes.addressof(slots), *(t.data_ptr() for t in tensors)
        )
        self._banks = [bank for bank, _ in places]  # keeps their memory alive
        self._pointer = ctypes.byref(self._struct)

    def add(self, products: Products, site: str, x: Tensor, y: Tensor) -> None:
        """Add the mixed update of x (N, in) to y (N, sum of the members' outs), in place."""
        site_struct = self._sites.by_name.get(site)
        if site_struct is not None:
            arguments = site_struct, self._pointer, _pointer(x), _pointer(y)
            if not (self._many and products.has_tiles and products.lora_tiles(*arguments)):
                products.lora(*arguments)


class NativeStep:
    """Shapes and positions of one decoding step, for `attend`."""

    def __init__(self, heads: tuple[int, int, int], scale: float, capacity: int, rows: int) -> None:
        """Prepare for `rows` rows of `capacity` tokens; `heads`: query heads, key heads, width of a head."""
        self._scores = torch.empty(rows, heads[0], capacity)
        self._struct = _StepStruct(
            rows, *heads, capacity, scale, None, None, None, self._scores.data_ptr()
        )
        self.pointer = ctypes.byref(self._struct)

    def at(self, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Set the rows' positions (N,), int64, and their cos and sin (N, width), float32."""
        self._keepalive = (positions, cos, sin)
        self._struct.positions = positions.data_ptr()
        self._struct.cos, self._struct.sin = cos.data_ptr(), sin.data_ptr()


class Products:
    """The native functions for one dtype."""

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        """Look the functions up in the library, which must be available."""
        native_library: Any = library(folder)
        self.lora, self._norm, self._silu, self._attend = (
            getattr(native_library, f"{name}_{SUFFIX[dtype]}")
            for name in ("lora", "norm", "silu", "attend")
        )
        self.has_tiles = dtype == torch.bfloat16 and bool(native_library.has_tiles())
        """Whether `lora_tiles` can use the processor's matrix tiles (AMX)."""
        self.lora_tiles = native_library.lora_tiles

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add `delta` to x (N, W) in place; return weight * x / rms(x) (arXiv 1910.07467)."""
        out = torch.empty_like(x)
        rows, width = x.shape
        delta_pointer = None if delta is None else _pointer(delta)
        self._norm(
            _pointer(x),
            delta_pointer,
            _pointer(weight),
            _pointer(out),
            _int(rows),
            _int(width),
            ctypes.c_float(eps),
        )
        return out

    def silu(self, both: Tensor) -> Tensor:
        """Return silu(gate) * up for `both` (N, 2 W), gate and up side by side."""
        rows, width = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, width)
        self._silu(_pointer(both), _pointer(out), _int(rows), _int(width))
        return out

    def attend(
        self, step: NativeStep, qkv: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> Tensor:
        """Rotate q and k, cache k and v, and attend: `out` (N, heads * width) from qkv (N, all heads)."""
        self._attend(step.pointer, _pointer(qkv), _pointer(keys), _pointer(values), _pointer(out))
        return out


_int = ctypes.c_int64


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _array(values: Sequence[float], kind: Any) -> Any:
    return (kind * len(values))(*values)
