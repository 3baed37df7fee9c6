"""The header of a safetensors file: its declarations, not yet validated."""

import os
from typing import Any, BinaryIO, NamedTuple

from adapters.strict_json import JsonFault, check_characters, parse_json

# Advice for owners of pickled weights.
CONVERT_HINT = (
    'Convert them only if you trust them, since loading pickles can execute code: python -c "import torch, '
    "safetensors.torch as s; s.save_file({k: v.clone() for k, v in torch.load('adapter_model.bin', weights_only=True, "
    "map_location='cpu').items()}, 'adapter_model.safetensors')\""
)
# Other files uploaded in place of weights, by their first bytes.
_OTHER_FORMATS = (
    ((b"PK\x03\x04", b"\x80"), f"are pickled, not safetensors. {CONVERT_HINT}"),
    ((b"version ",), "are a Git LFS pointer, not the file itself: fetch the file with `git lfs pull`"),
    ((b"GGUF",), "are a GGUF file, not safetensors: upload the file written by PEFT's save_pretrained"),
    (
        (b"<!", b"<html", b"<?xml"),
        "are a web page, not safetensors: the download got an error page",
    ),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), "are compressed, not safetensors: unpack the file first"),
)


class HeaderFault(ValueError):
    """The file has no readable header. The message is a predicate of something plural, such as weights."""


class Header(NamedTuple):
    """The declarations of a file."""

    tensors: dict[str, Any]  # name -> dtype, shape and data_offsets, each still to be checked
    metadata: dict[str, str]
    data_start: int  # in bytes, from the beginning of the file


def read_header(file: BinaryIO, max_bytes: int | None = None) -> Header:
    """The header of an open file, read from its beginning.

    Args:
        max_bytes: the largest header allowed.

    Raises:
        HeaderFault: it is cut short, too long, a pickle, or not one JSON object with a map of strings for metadata.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > os.fstat(file.fileno()).st_size - 8:
        for beginnings, reason in _OTHER_FORMATS:
            if start.startswith(beginnings):
                raise HeaderFault(reason)
        raise HeaderFault("are cut short, or not a safetensors file: the header does not fit in")
    if max_bytes is not None and length > max_bytes:
        raise HeaderFault(f"have a header of {length} bytes; at most {max_bytes} are allowed")
    raw = file.read(length)
    try:
        tensors = parse_json(raw, finite=True)
        check_characters(raw, tensors)
    except JsonFault as fault:
        raise HeaderFault(f"have a header that {fault}") from None
    if not isinstance(tensors, dict):
        raise HeaderFault("have a header that is not a JSON object")
    metadata = tensors.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderFault("have a __metadata__ that is not an object of strings")
    return Header(tensors, metadata, 8 + length)
