"""Tensors that still lie in their files: converted while only their shapes are known, and read one at a time.

So a network is filled with no more memory than its own weights and one tensor of the file take. Each tensor is mapped
into memory by itself, and let go by itself; one that is kept as it is stays mapped, and processes share its pages.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlbooth.data.errors import UserError
from controlbooth.models.files.weight_files import safetensors_header

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip


class Stored:
    """Stands for a tensor of a file, or for what a function of torch makes of such tensors.

    Functions of torch take it as a tensor and give another one that is stored; only `read` touches values.
    """

    def __init__(self, form: Tensor, read: Callable[[], Tensor], names: frozenset[str]) -> None:
        self.form = form
        """Shape and dtype, on the device "meta"."""
        self.read = read
        """Gives the values on the CPU, anew at every call; of a base without values, `form`."""
        self.names = names
        """The tensors of the file that it is made of."""

    @property
    def shape(self) -> torch.Size:
        return self.form.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.form.dtype

    @property
    def ndim(self) -> int:
        return self.form.ndim

    @property
    def T(self) -> Any:
        return torch.t(self)  # pyright: ignore[reportArgumentType]

    def is_floating_point(self) -> bool:
        return self.form.is_floating_point()

    def __getitem__(self, index: Any) -> Any:
        return _later(Tensor.__getitem__, (self, index), {})

    def chunk(self, *arguments: Any, **options: Any) -> Any:
        return _later(torch.chunk, (self, *arguments), options)

    def clone(self) -> "Stored":
        """Returns the tensor itself: nothing that is read is shared, and nothing has a gradient."""
        return self

    contiguous = detach = clone

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _later(function, arguments, options or {})


def _later(function: Any, arguments: Any, options: Mapping[str, Any]) -> Any:
    """Calls a function on the shapes now, and on the values whenever they are read."""
    sources: list[Stored] = []

    def form(stored: Stored) -> Tensor:
        sources.append(stored)
        return stored.form

    made = function(*_with(arguments, form), **options)
    names = frozenset[str]().union(*(source.names for source in sources))

    def read(part: int | None) -> Tensor:
        values = function(*_with(arguments, lambda stored: stored.read()), **options)
        return values if part is None else values[part]

    if isinstance(made, Tensor):
        return Stored(made, lambda: read(None), names)
    return tuple(Stored(one, lambda part=part: read(part), names) for part, one in enumerate(made))


def _with(arguments: Any, take: Callable[[Stored], Tensor]) -> Any:
    """Returns the arguments of a call with `take(stored)` in place of each stored tensor."""
    if isinstance(arguments, Stored):
        return take(arguments)
    if isinstance(arguments, list | tuple):
        return type(arguments)(_with(one, take) for one in arguments)
    return arguments


def stored_tensors(files: Sequence[Path], empty: bool = False) -> dict[str, Stored]:
    """Returns name -> stored tensor of all files together; with `empty` no values will ever be read, and none has any.

    Raises ValueError for a damaged file, a dtype that is not known, and a name that two files have.
    """
    tensors: dict[str, Stored] = {}
    origin: dict[str, Path] = {}
    for file in files:
        for name, entry in safetensors_header(file).items():
            if name in origin:
                raise UserError(f"{name} is in {origin[name]} and in {file.name}: delete the file of another download")
            if entry["dtype"] not in _DTYPES:
                raise UserError(f"{name} of {file} has the dtype {entry['dtype']}, which cannot be read. Convert it")
            origin[name] = file
            form = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
            tensors[name] = Stored(form, _reader(file, entry, form, empty), frozenset([name]))
    return tensors


def _reader(file: Path, entry: Mapping[str, Any], form: Tensor, empty: bool) -> Callable[[], Tensor]:
    def read() -> Tensor:
        if empty:
            return form
        if not form.numel():
            return torch.empty(form.shape, dtype=form.dtype)
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little") + entry["data_offsets"][0]
            page = start - start % mmap.ALLOCATIONGRANULARITY
            length = start - page + form.nbytes
            try:
                if os.fstat(stream.fileno()).st_size < page + length:
                    raise OSError("it ends before its tensors do")
                mapped = _map(stream.fileno(), page, length)
            except OSError as error:
                raise UserError(f"{file} cannot be read: {error}. Fetch it again") from error
        return torch.frombuffer(mapped, dtype=form.dtype, count=form.numel(), offset=start - page).view(form.shape)

    return read


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *3 * (ctypes.c_int,), ctypes.c_longlong)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def _map(descriptor: int, offset: int, length: int) -> ctypes.Array:
    """Maps `length` bytes of a file from `offset` on, a multiple of a page; what is written is not seen in the file.

    Python's own mmap keeps a descriptor open for each mapping (until 3.13), and a base has thousands of tensors where a
    process has often 1,024 descriptors. Raises OSError.
    """
    address = _LIBC.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, descriptor, offset)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    mapped = (ctypes.c_char * length).from_address(address)
    # not when the interpreter ends: tensors may outlive this module, and the system lets go of all then
    weakref.finalize(mapped, _LIBC.munmap, address, length).atexit = False
    return mapped
