"""Reading a Hugging Face checkpoint of safetensors files: headers first, then only the slices asked for."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hexgen.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_INDEX_BYTES = 256 * 1024 * 1024
MAX_SHARDS = 10_000

# The stored types that are weights of an unquantized model, and their bytes.
_STORED_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_ONLY_SAFETENSORS = "only safetensors are loaded: convert the checkpoint with save_pretrained of transformers"


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor, as its file's header describes it."""

    file: Path
    stored: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of the Hugging Face directory ``path`` (one ``model.safetensors``, or an index and its shards).

    Opening reads and checks the headers alone, and raises ``CheckpointError`` where a file is missing, truncated
    or malformed. Weights are read by ``read``, memory-mapped, one slice at a time.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self._open: dict[Path, Any] = {}
        self._entries: dict[str, _Entry] = {}
        files, self._index = self._list_files()
        for file in files:
            self._entries.update(_read_header(file))
        for name, file in self._index.items():
            entry = self._entries.get(name)
            if entry is None or entry.file != file:
                raise CheckpointError(f"the index lists tensor {name!r}, which the file lacks", where=str(file))

    def _list_files(self) -> tuple[list[Path], dict[str, Path]]:
        """The files to open, and where the index (if there is one) says that each tensor is."""
        single, index = self.path / SINGLE_FILE, self.path / INDEX_FILE
        if single.is_file():
            return [single], {}
        if index.is_file():
            where_is = _read_index(index)
            return sorted(set(where_is.values())), where_is
        if not self.path.is_dir():
            raise CheckpointError("no such directory", where=str(self.path))
        pickled = any(self.path.glob("pytorch_model*.bin"))
        raise CheckpointError(
            f"neither {SINGLE_FILE} nor {INDEX_FILE}" + (", only pickled weights" if pickled else ""),
            where=str(self.path),
            remedy=_ONLY_SAFETENSORS if pickled else "give the directory that holds the weights",
        )

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """``CheckpointError``, naming file, tensor and shape, unless the tensor is there with this shape."""
        self._expect(name, shape)

    def stored_bytes(
        self, name: str, dim: int | None = None, start: int | None = None, end: int | None = None
    ) -> int:
        """Bytes of a tensor, or of its slice ``[start, end)`` along ``dim``, in the file."""
        entry = self._entry(name)
        shape = list(entry.shape)
        if dim is not None:
            shape[dim] = _bounds(entry, name, dim, start, end)[1]
        return math.prod(shape) * _STORED_BYTES[entry.stored]

    def read(
        self,
        name: str,
        dim: int | None = None,
        start: int | None = None,
        end: int | None = None,
        *,
        dtype: torch.dtype,
        shape: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """The tensor, or its slice ``[start, end)`` along ``dim``: a contiguous CPU copy in ``dtype``.

        Only the slice's own bytes are read. ``shape`` is the whole tensor's expected shape. ``CheckpointError``
        names file, tensor and expected shape where the tensor is missing or differs.
        """
        entry = self._entry(name) if shape is None else self._expect(name, shape)
        wanted = list(entry.shape)
        index: list[slice] = [slice(None)] * len(wanted)
        if dim is not None:
            first, length = _bounds(entry, name, dim, start, end)
            index[dim] = slice(first, first + length)
            wanted[dim] = length
        if 0 in wanted:
            return torch.empty(wanted, dtype=dtype)
        try:
            part: torch.Tensor = self._file(entry.file).get_slice(name)[tuple(index)]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"tensor {name!r} cannot be read: {error}", where=str(entry.file)) from error
        self.bytes_read += math.prod(wanted) * _STORED_BYTES[entry.stored]
        return part.to(dtype).contiguous()

    def close(self) -> None:
        """Unmap the files. Reading again maps them again."""
        self._open.clear()

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt", device="cpu")
        return self._open[file]

    def _expect(self, name: str, shape: tuple[int, ...]) -> _Entry:
        entry = self._entry(name, shape)
        if entry.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(entry.shape)}, expected {list(shape)}",
                where=str(entry.file),
                remedy="config.json does not belong to these weights",
            )
        return entry

    def _entry(self, name: str, shape: tuple[int, ...] | None = None) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            expected = f" (expected shape {list(shape)})" if shape is not None else ""
            raise CheckpointError(
                f"tensor {name!r} is missing{expected}",
                where=str(self.path / (INDEX_FILE if self._index else SINGLE_FILE)),
                remedy="the download may be incomplete, or config.json belongs to another model",
            ) from None


def _bounds(entry: _Entry, name: str, dim: int, start: int | None, end: int | None) -> tuple[int, int]:
    """First index and length of a slice along ``dim``; ``CheckpointError`` where it is outside the tensor."""
    if dim >= len(entry.shape):
        raise CheckpointError(
            f"tensor {name!r} has shape {list(entry.shape)}: no dimension {dim}", where=str(entry.file)
        )
    size = entry.shape[dim]
    first, last = start or 0, size if end is None else end
    if not 0 <= first <= last <= size:
        raise CheckpointError(
            f"tensor {name!r} has shape {list(entry.shape)}: no slice [{first}, {last}) along dimension {dim}",
            where=str(entry.file),
        )
    return first, last - first


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor name to shard file, every shard inside the checkpoint's directory."""
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(f"the index is larger than {MAX_INDEX_BYTES} bytes", where=str(index))
    try:
        content = json.loads(index.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"malformed JSON: {error}", where=str(index)) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("no weight_map", where=str(index))
    where_is: dict[str, Path] = {}
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard == PurePath(shard).name and shard not in ("", ".", "..")
        if not plain or "\\" in shard or "\0" in shard:
            raise CheckpointError(f"shard {shard!r} is not the name of a file in the directory", where=str(index))
        if not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"shard {shard!r} is not a safetensors file", where=str(index), remedy=_ONLY_SAFETENSORS
            )
        where_is[name] = index.parent / shard
    if len(set(where_is.values())) > MAX_SHARDS:
        raise CheckpointError(f"more than {MAX_SHARDS} shards", where=str(index))
    return where_is


def _read_header(file: Path) -> dict[str, _Entry]:
    """The tensors of one safetensors file, after checking that their data is all there.

    The format: 8 bytes of little-endian header length, a JSON header, then the data, without holes.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if len(prefix) < 8 or 8 + header_bytes > size:
                raise CheckpointError(
                    f"truncated: {size} bytes end before the header does",
                    where=str(file),
                    remedy="download or copy the file again",
                )
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"a header of {header_bytes} bytes is above {MAX_HEADER_BYTES}", where=str(file)
                )
            header = json.loads(stream.read(header_bytes))
    except FileNotFoundError:
        raise CheckpointError("no such file", where=str(file), remedy="download the missing shard") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(file)) from error
    except ValueError as error:
        raise CheckpointError(f"not a safetensors file: malformed header: {error}", where=str(file)) from error
    if not isinstance(header, dict):
        raise CheckpointError("not a safetensors file: the header is no object", where=str(file))
    entries = {
        name: _parse_entry(file, name, fields, size - 8 - header_bytes)
        for name, fields in header.items()
        if name != "__metadata__"
    }
    return entries


def _parse_entry(file: Path, name: str, fields: Any, data_bytes: int) -> _Entry:
    """Check one header entry against the bytes that the file has for data."""
    try:
        stored, shape = str(fields["dtype"]), tuple(fields["shape"])
        begin, end = fields["data_offsets"]
        numbers_ok = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (TypeError, KeyError, ValueError):
        numbers_ok = False
    if not numbers_ok:
        raise CheckpointError(f"malformed header entry of tensor {name!r}", where=str(file))
    if end > data_bytes:
        raise CheckpointError(
            f"truncated: tensor {name!r} ends at byte {end} of the data, the file has {data_bytes}",
            where=str(file),
            remedy="download or copy the file again",
        )
    if stored not in _STORED_BYTES:
        raise CheckpointError(
            f"tensor {name!r} is stored as {stored}, which is none of {', '.join(_STORED_BYTES)}",
            where=str(file),
            remedy="quantized checkpoints are not supported",
        )
    if math.prod(shape) * _STORED_BYTES[stored] != end - begin:
        raise CheckpointError(
            f"tensor {name!r} of shape {list(shape)} and type {stored} takes {end - begin} bytes in the header",
            where=str(file),
        )
    return _Entry(file, stored, shape)


def torch_dtype(name: str) -> torch.dtype:
    """``"float32"``, ``"bfloat16"`` or ``"float16"`` as torch's own."""
    kinds: Mapping[str, torch.dtype] = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    return kinds[name]
