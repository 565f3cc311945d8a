"""Codes on disk: written batch by batch as an SAE makes them, read by rows without loading the rest.

A folder of three plain little-endian arrays and a description, none of which ever holds more than the entries:

    values.f32        (nnz,)           float32
    features.u16|u32  (nnz,)           16 bits where the dictionary has at most 65,536 features, else 32
    row_starts.u64    (n_tokens + 1,)
    codes.json        n_features, n_tokens, nnz, and the version of this format

A folder is there when it is whole: it is written beside its place and renamed.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saekit.codes import SparseCodes
from saekit.errors import FileError
from saekit.sae import SAE

FORMAT_VERSION = 1
_DESCRIPTION = "codes.json"
_VALUES, _STARTS = np.dtype("<f4"), np.dtype("<u8")


@dataclass(frozen=True, slots=True)
class CodesFile:
    """Codes in a folder, of which only what is asked for is read.

    Attributes:
        folder: where they are.
        n_tokens, n_features, nnz: rows, width of the dictionary, and entries of all rows.
    """

    folder: Path
    n_tokens: int
    n_features: int
    nnz: int

    @classmethod
    def open(cls, folder: Path | str) -> "CodesFile":
        """Read the description, and check that the arrays are as long as it says.

        Raises:
            FileError: if there are no codes, or not all of them.
        """
        folder = Path(folder)
        try:
            facts = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
            version, codes = facts["version"], cls(folder, facts["n_tokens"], facts["n_features"], facts["nnz"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FileError(f"no codes in {folder} ({error}); write them with write_codes") from error
        if version != FORMAT_VERSION:
            raise FileError(
                f"the codes in {folder} are of format {version}, this saekit reads {FORMAT_VERSION}; update it"
            )
        lengths = {"values": codes.nnz, "features": codes.nnz, "row_starts": codes.n_tokens + 1}
        for name, dtype in _files(codes.n_features).items():
            path = folder / f"{name}.{_suffix(dtype)}"
            wanted = lengths[name] * dtype.itemsize
            if not path.is_file() or path.stat().st_size != wanted:
                raise FileError(f"{path} is missing or not {wanted:,} bytes long; write the codes again")
        return codes

    def rows(self, start: int, stop: int) -> SparseCodes:
        """The codes of tokens `start` to `stop`, as a slice would take them.

        Raises:
            ShapeError: contents that no SAE of this width has written.
        """
        start, stop, _ = slice(start, stop).indices(self.n_tokens)
        starts = self._array("row_starts")[start : max(start, stop) + 1].astype(np.int64)
        first, end = int(starts[0]), int(starts[-1])
        return SparseCodes(
            torch.from_numpy(self._array("values")[first:end].copy()),
            torch.from_numpy(self._array("features")[first:end].astype(np.int64)),
            torch.from_numpy(starts - first),
            self.n_features,
        ).validate()

    def _array(self, name: str) -> np.ndarray:
        dtype = _files(self.n_features)[name]
        path = self.folder / f"{name}.{_suffix(dtype)}"
        return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def write_codes(sae: SAE, batches: Iterable[Tensor], folder: Path | str) -> CodesFile:
    """Encode batch after batch to a folder; memory holds one batch and its codes.

    Args:
        batches: activations in the SAE's units, each `(n_tokens, d_model)`. A rule that looks
            across tokens shares its budget per batch.

    Raises:
        FileError: if the folder is there already, or cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileError(f"{folder} is there already; choose another folder, or delete it")
    beside = folder.with_name(f"{folder.name}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        _append_all(sae, batches, beside)
        os.replace(beside, folder)
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error}; check space and rights") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return CodesFile.open(folder)


def _append_all(sae: SAE, batches: Iterable[Tensor], folder: Path) -> None:
    files = _files(sae.n_features)
    paths = {name: folder / f"{name}.{_suffix(dtype)}" for name, dtype in files.items()}
    n_tokens = nnz = 0
    with (
        paths["values"].open("wb") as values,
        paths["features"].open("wb") as features,
        paths["row_starts"].open("wb") as starts,
    ):
        starts.write(np.zeros(1, _STARTS).tobytes())
        for batch in batches:
            with torch.inference_mode():
                codes = sae.encode(batch.to(sae.b_dec.device)).to("cpu")
            values.write(codes.values.float().numpy().astype(_VALUES, copy=False).data)
            features.write(codes.features.numpy().astype(files["features"]).data)
            starts.write((codes.row_starts[1:].numpy() + nnz).astype(_STARTS).data)
            n_tokens, nnz = n_tokens + codes.n_tokens, nnz + len(codes.values)
    facts = {"version": FORMAT_VERSION, "n_features": sae.n_features, "n_tokens": n_tokens, "nnz": nnz}
    (folder / _DESCRIPTION).write_text(json.dumps(facts), encoding="utf-8")


def _files(n_features: int) -> dict[str, np.dtype]:
    return {"values": _VALUES, "features": np.dtype("<u2" if n_features <= 1 << 16 else "<u4"), "row_starts": _STARTS}


def _suffix(dtype: np.dtype) -> str:
    return f"{dtype.kind}{8 * dtype.itemsize}"
