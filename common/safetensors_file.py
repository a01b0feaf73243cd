"""The safetensors format, as far as a file that is written piece by piece needs it.

    8 bytes     length of the header, little-endian
    header      JSON: {"__metadata__": {..}, "name": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, ..}
    data        the tensors' bytes, row-major, little-endian, without gaps

The library writes a file only as a whole and of memory that no two tensors share. Source:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

_DTYPES: Final = {
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

_LONGEST_HEADER: Final = 100_000_000
"""Bytes, as in the library, which reads no longer ones."""


@dataclass(frozen=True)
class Header:
    """What a whole file says of itself.

    Attributes:
        metadata: text by name.
        names: of its tensors.
    """

    metadata: Mapping[str, str]
    names: tuple[str, ...]


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[memoryview, list[Tensor]]:
    """Make the beginning of a file.

    Args:
        tensors: by name; they may share memory.
        metadata: text by name.

    Returns:
        Its bytes, the header's length included, and the tensors in the order in which their data follow.

    Raises:
        TypeError: safetensors has no word for a tensor's dtype, or it is not dense.
    """
    # Wide elements first, as the library does, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            raise TypeError(f"a {tensor.layout} tensor of {tensor.dtype} cannot be kept, at {name}")
        begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise TypeError(f"a state of {len(tensors)} tensors is too nested for one file")
    return memoryview(struct.pack("<Q", len(text)) + text), [tensor for _, tensor in ordered]


def data_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row-major; a view of its memory where that is in host memory and in this order."""
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def read_header(path: Path) -> Header | None:
    """Read the beginning of a file, and look at its length.

    Returns:
        None where it is no safetensors file, or not a whole one.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            return None
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        is_whole = 8 + length + end == size and all(isinstance(value, str) for value in metadata.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return Header(metadata, tuple(entries)) if is_whole else None
