"""The small products of a decoding step on a CPU, in C++ (`native.cpp`), where the machine has a compiler.

torch calls cost some microseconds each, and its batched products read an adapter's factors at a third of the
memory's speed; these read each once. They are compiled for this processor when they are first needed (a
second or two) and kept in the cache folder. Without a compiler, on other devices and for other dtypes torch
does the same work, slower. ADAPTERHUB_NATIVE=0 turns them off.
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
WIDEST_HEAD = 256

log = logging.getLogger("adapterhub_chat")


class _Site(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("members", "rank", "in_", "out", "a_at")),
        ("b_at", ctypes.c_void_p),
        ("outs", ctypes.c_void_p),
    )


class _Entries(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("slots", "starts", "rows", "weights", "low")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int64) for n in ("rows", "heads", "kv_heads", "width", "capacity")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "positions", "scores")),
    )


def available(device: torch.device, dtype: torch.dtype, folder: Path) -> bool:
    """Return whether there are native products for tensors like these; `folder` keeps the library."""
    return device.type == "cpu" and dtype in SUFFIX and library(folder) is not None


@functools.cache
def library(folder: Path) -> ctypes.CDLL | None:
    """Return the compiled products, out of `folder` or compiled now; None where that is not possible."""
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
    """Return whether `library` is there at once: whoever can do without it need not wait for a compiler."""
    compiler = _compiler()
    return bool(compiler) and _path(folder, *compiler).is_file() and library(folder) is not None


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or _found(os.environ.get("PATH", ""))


@functools.cache
def _found(path: str) -> list[str]:
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
    """Put an adapter into a slot of a bank, as `Bank.write` does, in one call where that can be.

    Another device gets its slot whole: hundreds of small copies would each wait for their turn.
    """
    if bank.device.type != "cpu" and not bank.trainable:
        _write_whole(folder, bank, slot, weights)
        return
    usable = not bank.trainable and bank.dtype in SUFFIX
    found = weights.addresses(bank.dtype) if usable else None
    if found is None or not compiled(folder):
        bank.write(slot, weights)
        return
    if weights.num_parameters < bank.flat.shape[1]:
        bank.flat[slot].zero_()
    size = bank.flat.element_size()
    start = bank.flat.data_ptr() + slot * bank.flat.stride(0) * size
    parts, scales = [], []
    for (module, (a, b)), (at_a, at_b) in zip(weights.shapes.items(), found, strict=True):
        to_a, to_b = bank.offsets[module]
        parts += [at_a, start + to_a * size, *a, 0, at_b, start + to_b * size, *b, 1]
        scales += [1.0, weights.scale(module)]
    call = getattr(library(folder), f"fill_{SUFFIX[bank.dtype]}")
    call(_array(parts, ctypes.c_int64), _array(scales, ctypes.c_float), _int(len(scales)))
    bank.write_head(slot, weights.head)


def _write_whole(folder: Path, bank: Bank, slot: int, weights: AdapterWeights) -> None:
    """Put an adapter together in the host's memory, and copy it to the bank's device in one go."""
    twin = bank.host_copy()
    write(folder, twin, 0, weights)
    bank.flat[slot].copy_(twin.flat[0])
    bank.labels[slot] = twin.labels[0]


class Sites:
    """Where the factors of every site lie in a slot of one layout of bank."""

    def __init__(self, bank: Bank) -> None:
        """Read the layout off a bank; others with the same sites and rank have the same."""
        self._kept: list[Any] = []
        self.widest = max((len(s.members) * bank.rank for s in bank.sites.values()), default=0)
        self.by_name = {name: self._site(bank, name) for name in bank.sites}

    def _site(self, bank: Bank, name: str) -> Any:
        site, size, base = bank.sites[name], bank.flat.element_size(), bank.flat.data_ptr()
        b_at = _array([(bank.B[m].data_ptr() - base) // size for m in site.members], ctypes.c_int64)
        outs = _array(site.out_features, ctypes.c_int64)
        a_at = (bank.A[name].data_ptr() - base) // size
        sizes = (len(site.members), bank.rank, site.in_features, sum(site.out_features), a_at)
        made = _Site(*sizes, ctypes.addressof(b_at), ctypes.addressof(outs))
        self._kept += [b_at, outs, made]
        return ctypes.byref(made)


class Entries:
    """Which rows have which slots, for all sites of one layout of bank."""

    def __init__(
        self, places: Sequence[tuple[Bank, int]], mix: Tensor, sites: Sites, *, many: bool = False
    ) -> None:
        """Take `mix` (N, G), the weight of each of the `places` in every row; `many` rows a place."""
        self._many = many
        pointers = [bank.flat[slot].data_ptr() for bank, slot in places]
        used = mix.T != 0
        group, rows = used.nonzero(as_tuple=True)
        counts = torch.bincount(group, minlength=len(places)).cumsum(0)
        self._sites = sites
        self._kept = (
            _array(pointers, ctypes.c_void_p),
            torch.cat([counts.new_zeros(1), counts]),
            rows.contiguous(),
            mix.T[used].float().contiguous(),
            torch.empty(len(rows) * sites.widest),
        )
        slots, *tensors = self._kept
        self._struct = _Entries(
            len(places), ctypes.addressof(slots), *(t.data_ptr() for t in tensors)
        )
        self._banks = [bank for bank, _ in places]  # keeps their memory
        self._itself = ctypes.byref(self._struct)

    def add(self, products: Products, site: str, x: Tensor, y: Tensor) -> None:
        """Add the mixed update of x (N, in) to y (N, outs of all members side by side), in place."""
        found = self._sites.by_name.get(site)
        if found is not None:
            given = found, self._itself, _at(x), _at(y)
            if not (self._many and products.has_tiles and products.lora_tiles(*given)):
                products.lora(*given)


class NativeStep:
    """One decoding step's shapes and positions, for `attend`."""

    def __init__(self, heads: tuple[int, int, int], scale: float, capacity: int, rows: int) -> None:
        """Prepare for `rows` rows of `capacity` tokens; `heads`: of queries, of keys, and their width."""
        self._scores = torch.empty(rows, heads[0], capacity)
        self._struct = _Step(
            rows, *heads, capacity, scale, None, None, None, self._scores.data_ptr()
        )
        self.itself = ctypes.byref(self._struct)

    def at(self, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Set the rows' positions (N,), int64, and their cos and sin (N, width), float32."""
        self._kept = (positions, cos, sin)
        self._struct.positions = positions.data_ptr()
        self._struct.cos, self._struct.sin = cos.data_ptr(), sin.data_ptr()


class Products:
    """The native functions for one dtype."""

    def __init__(self, dtype: torch.dtype, folder: Path) -> None:
        """Find them in the library, which must be available."""
        found: Any = library(folder)
        self.lora, self._norm, self._silu, self._attend = (
            getattr(found, f"{name}_{SUFFIX[dtype]}") for name in ("lora", "norm", "silu", "attend")
        )
        self.has_tiles = dtype == torch.bfloat16 and bool(found.has_tiles())
        """Whether `lora_tiles` does many rows of one slot by the processor's matrix tiles."""
        self.lora_tiles = found.lora_tiles

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add `delta` to x (N, W) in place; return weight * x / rms(x) (arXiv 1910.07467)."""
        out = torch.empty_like(x)
        rows, width = x.shape
        more = None if delta is None else _at(delta)
        self._norm(
            _at(x), more, _at(weight), _at(out), _int(rows), _int(width), ctypes.c_float(eps)
        )
        return out

    def silu(self, both: Tensor) -> Tensor:
        """Return silu(gate) * up for `both` (N, 2 W), gate and up side by side."""
        rows, width = both.shape[0], both.shape[1] // 2
        out = both.new_empty(rows, width)
        self._silu(_at(both), _at(out), _int(rows), _int(width))
        return out

    def attend(
        self, step: NativeStep, qkv: Tensor, keys: Tensor, values: Tensor, out: Tensor
    ) -> Tensor:
        """Turn q and k, cache k and v, and attend: `out` (N, heads * width) from qkv (N, all heads)."""
        self._attend(step.itself, _at(qkv), _at(keys), _at(values), _at(out))
        return out


_int = ctypes.c_int64


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _array(values: Sequence[float], kind: Any) -> Any:
    return (kind * len(values))(*values)
