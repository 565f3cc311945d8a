"""Tensors out of safetensors, npz and torch's own files: nothing is executed, nothing is larger than the file says.

Each reader gives the tensors by name and whatever else the file holds. With `contents=False` tensors of more than one
element come back on the meta device: their shapes are known and their numbers are not read.
"""

import io
import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saekit.errors import FileError

Read = tuple[dict[str, Tensor], dict[str, Any]]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# weights hardly compress; an archive that grows more than this when unpacked was made to fill memory
_MOST_COMPRESSION = 64
_LARGEST_HEADER = 16 * 2**20


def read_tensors(path: Path, *, contents: bool = True) -> Read:
    """Tensors by name, and the rest of what the file holds.

    Raises:
        FileError: a kind of file that holds no tensors, a damaged one, or one that can only be read by running it.
    """
    if path.suffix not in READERS:
        raise FileError(f"{path} is no file of weights; expected {', '.join(READERS)}")
    return _not_empty(path, READERS[path.suffix](path, contents))


def read_header(path: Path, file: io.BufferedReader) -> Read:
    """What `read_tensors` gives without contents, from a file that need not be on this machine.

    Args:
        file: can be sought in; only what says which tensors there are, and single numbers, is read.

    Raises:
        FileError: a damaged file, or one whose shapes cannot be told without its contents.
    """
    if path.suffix not in HEADERS:
        raise FileError(f"{path} says its shapes nowhere but in its contents; expected {', '.join(HEADERS)}")
    return _not_empty(path, HEADERS[path.suffix](path, file))


def _not_empty(path: Path, read: Read) -> Read:
    if not read[0]:
        raise FileError(f"{path} holds no tensors; give a file of weights")
    return read


def _safetensors_header(path: Path, file: io.BufferedReader) -> Read:
    """The format is 8 bytes of length, a JSON object of that length, and the numbers."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
        raise _damaged(path, ValueError(f"a header of {length:,} bytes in a file of {size:,}"))
    try:
        header = json.loads(file.read(length))
        described = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _described(file, 8 + length, size, entry) for name, entry in described.items()}, {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _described(file: io.BufferedReader, start: int, size: int, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("shapes and offsets must be whole numbers")
    if math.prod(shape) * dtype.itemsize != end - begin or start + end > size:
        raise ValueError(f"a tensor {shape} of {entry['dtype']} at {begin} to {end} of {size} bytes")
    if math.prod(shape) != 1:
        return _only_shape(shape, dtype)
    file.seek(start + begin)
    return torch.frombuffer(bytearray(file.read(end - begin)), dtype=dtype).reshape(shape)


def _npz_header(path: Path, file: io.BufferedReader) -> Read:
    return _npz(path, contents=False, file=file)


HEADERS: dict[str, Callable[[Path, io.BufferedReader], Read]] = {
    ".safetensors": _safetensors_header,
    ".npz": _npz_header,
}


def _safetensors(path: Path, contents: bool) -> Read:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if contents:
                return {name: file.get_tensor(name) for name in names}, {}
            slices = {name: file.get_slice(name) for name in names}
            shapes = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            return {
                name: file.get_tensor(name) if math.prod(shape) <= 1 else _only_shape(shape, _DTYPES[dtype])
                for name, (shape, dtype) in shapes.items()
            }, {}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _npz(path: Path, contents: bool, file: io.BufferedReader | None = None) -> Read:
    try:
        with zipfile.ZipFile(file or path) as archive:
            _check_compression(path, archive, size=file.seek(0, io.SEEK_END) if file else path.stat().st_size)
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            return {info.filename[:-4]: _npy(path, archive, info, contents) for info in members}, {}
    except FileError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, error) from error


def _npy(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, contents: bool) -> Tensor:
    with archive.open(info) as file:
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, column_major, dtype = read_header(file)
        if dtype.kind not in "fiu" or math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise FileError(
                f"{info.filename} in {path} says it is {shape} of {dtype}, which is not what it holds; copy it again"
            )
        if not contents and math.prod(shape) > 1:
            return _only_shape(shape, torch.from_numpy(np.empty(0, dtype)).dtype)
        numbers = np.frombuffer(bytearray(file.read()), dtype=dtype)
        return torch.from_numpy(numbers.reshape(shape, order="F" if column_major else "C"))


def _torch(path: Path, contents: bool) -> Read:
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                _check_compression(path, archive, size=path.stat().st_size)
        with warnings.catch_warnings():
            # torch remarks on pickles that it goes on to refuse
            warnings.simplefilter("ignore")
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise FileError(
            f"{path} holds more than tensors, and reading the rest could run code ({_first_line(error)}); "
            "save its state_dict where you trust it, as safetensors, and load that"
        ) from error
    except FileError:
        raise
    # whatever is wrong in a pickle shows as one of many errors
    except Exception as error:
        raise _damaged(path, error) from error
    if not isinstance(held, Mapping):
        raise FileError(f"{path} holds a {type(held).__name__}; expected tensors by name (a state_dict)")
    # a backup of dictionary_learning keeps the weights one level down, beside the optimiser
    tensors = held["ae"] if isinstance(held.get("ae"), Mapping) else held
    rest = {str(name): value for name, value in held.items() if not isinstance(value, Tensor) and name != "ae"}
    return {
        str(name): _checked(path, str(name), value, contents)
        for name, value in tensors.items()
        if isinstance(value, Tensor)
    }, rest


READERS: dict[str, Callable[[Path, bool], Read]] = {
    ".safetensors": _safetensors,
    ".npz": _npz,
    ".pt": _torch,
    ".pth": _torch,
    ".bin": _torch,
}


def _checked(path: Path, name: str, tensor: Tensor, contents: bool) -> Tensor:
    """A view may claim any size over a storage of one number."""
    if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise FileError(
            f"{name} in {path} says it is {tuple(tensor.shape)}, which is more than it holds; copy the file again"
        )
    return tensor.detach() if contents or tensor.numel() <= 1 else _only_shape(tuple(tensor.shape), tensor.dtype)


def _check_compression(path: Path, archive: zipfile.ZipFile, *, size: int) -> None:
    unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > _MOST_COMPRESSION * size:
        raise FileError(
            f"{path} would unpack to {unpacked / 1e6:,.0f} MB, more than {_MOST_COMPRESSION} times its size; "
            "weights do not compress so well, so it was not opened"
        )


def _only_shape(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _damaged(path: Path, error: Exception) -> FileError:
    return FileError(f"{path} is damaged or cut short ({_first_line(error)}); copy or download it again")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
