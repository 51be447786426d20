"""Files of torch.save: zip archives (torch 1.6 and later), and the legacy sequence of pickles."""

from __future__ import annotations

import io
import lzma
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NoReturn

from cqr_compress.checkpoint.base import Checkpoint, Format
from cqr_compress.checkpoint.formats.budget import Budget, Meter
from cqr_compress.checkpoint.formats.foreign import explain_zip
from cqr_compress.checkpoint.formats.mapped_storage import LazyStorage, SourceFile
from cqr_compress.checkpoint.formats.nesting import checkpoint_from_tree
from cqr_compress.checkpoint.formats.safe_pickle import describe, load_structure
from cqr_compress.errors import CheckpointError, FormatError, brief

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7
_RESAVE = "Open it once with torch.load in an environment you trust and save it again with torch.save."


def open_torch_zip(path: Path) -> Checkpoint:
    """Open a zip file of torch.save; tensors are not read yet.

    Raises:
        CheckpointError: not a torch zip file, or a damaged one.
    """
    meter = Meter(Budget.for_file(path.stat().st_size), str(path))
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, struct.error) as e:
        raise CheckpointError(
            f"{str(path)!r} starts like a zip file, but cannot be opened as one ({e}): it is truncated or damaged"
        ) from e
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            known = f": {explain_zip(path, {*members})}" if not pickles else ""
            raise CheckpointError(
                f"{str(path)!r} is a zip file with {len(pickles)} data.pkl members, not a torch checkpoint{known}"
            )
        prefix = pickles[0].removesuffix("data.pkl")
        if f"{prefix}constants.pkl" in members:
            raise CheckpointError(
                f"{str(path)!r} is a TorchScript archive. Save its state_dict: "
                "torch.save(torch.jit.load(path).state_dict(), 'ckpt.pt')."
            )
        if f"{prefix}byteorder" in members and _read(archive, members[f"{prefix}byteorder"], 16) != b"little":
            raise CheckpointError(f"{str(path)!r} was written big-endian. {_RESAVE}")
        structure = _read(archive, members[pickles[0]], meter.budget.pickle_bytes)
    source = SourceFile(path)

    def load_storage(pid: tuple[Any, ...]) -> LazyStorage:
        info = members.get(f"{prefix}data/{pid[2]}")
        if info is None:
            raise CheckpointError(f"{str(path)!r} has no storage {brief(pid[2])}: the file is damaged")
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"storage {brief(pid[2])} of {str(path)!r} is compressed inside the zip. {_RESAVE}"
            )
        return LazyStorage(pid[2], pid[4], source, _data_offset(source, info), info.file_size)

    try:
        root = load_structure(io.BytesIO(structure), load_storage, meter)
        return checkpoint_from_tree(root, path, "torch-zip", source.close, meter)
    except BaseException:
        source.close()
        raise


def open_torch_legacy(path: Path) -> Checkpoint:
    """Open a file of torch.save before 1.6: a sequence of pickles, then the bytes of the storages.

    Raises:
        CheckpointError: a damaged file.
    """
    nbytes = path.stat().st_size
    meter = Meter(Budget.for_file(nbytes), str(path))
    source = SourceFile(path)
    storages: dict[str, LazyStorage] = {}

    def load_storage(pid: tuple[Any, ...]) -> LazyStorage:
        if len(pid) > 5 and pid[5] is not None:
            raise CheckpointError(f"{str(path)!r} has storages that are views, from torch 0.3. {_RESAVE}")
        key, num_elements = pid[2], pid[4]
        if key not in storages:
            storages[key] = LazyStorage(key, num_elements, source, -1, num_elements * pid[1].dtype.itemsize)
        return storages[key]

    def no_storage(pid: tuple[Any, ...]) -> LazyStorage:
        raise CheckpointError(f"{str(path)!r} refers to a storage outside its objects")

    try:
        with path.open("rb") as opened:
            file = _BoundedReader(opened, nbytes)
            _magic, protocol, _system = (load_structure(file, no_storage, meter) for _ in range(3))
            if protocol != _LEGACY_PROTOCOL:
                raise CheckpointError(f"{str(path)!r} has protocol {describe(protocol)}, not {_LEGACY_PROTOCOL}")
            root = load_structure(file, load_storage, meter)
            keys = load_structure(file, no_storage, meter)
            offset = opened.tell()
        if (
            not isinstance(keys, list)
            or not all(isinstance(key, str) for key in keys)
            or (len(keys), set(keys)) != (len(storages), set(storages))
        ):
            raise CheckpointError(f"{str(path)!r} does not list the storages that its tensors use")
        for key in keys:  # each: int64 number of elements, then the values
            storage = storages[key]
            (found,) = struct.unpack("<q", bytes(source.copy(offset, 8).numpy()))
            if found != storage.num_elements:
                raise CheckpointError(
                    f"storage {key!r} of {str(path)!r} has {found} elements, not {storage.num_elements}"
                )
            storage.offset = offset + 8
            offset = storage.offset + storage.nbytes
        if offset > nbytes:
            raise CheckpointError(
                f"{str(path)!r} is truncated: its tensors end at byte {offset}, but the file has {nbytes} bytes"
            )
        return checkpoint_from_tree(root, path, "torch-legacy", source.close, meter)
    except BaseException:
        source.close()
        raise


class _BoundedReader:
    """A file that is read up to a number of bytes, so that a declared length does not allocate more."""

    def __init__(self, file: IO[bytes], nbytes: int) -> None:
        self._file, self._left = file, nbytes

    def read(self, nbytes: int, /) -> bytes:
        data = self._file.read(min(nbytes, self._left))
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(self._left)
        self._left -= len(data)
        return data


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int) -> bytes:
    if info.file_size > max_bytes:
        raise FormatError(
            f"{info.filename!r} of {archive.filename!r} declares {info.file_size} bytes, out of proportion to its "
            f"file (at most {max_bytes}): it is damaged or made to exhaust memory"
        )
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, RuntimeError, ValueError) as e:
        raise CheckpointError(f"{info.filename!r} of {archive.filename!r} cannot be read: {e}") from e
    except MemoryError as e:  # a member compressed with a dictionary of gigabytes
        raise CheckpointError(f"{info.filename!r} of {archive.filename!r} needs too much memory") from e


def _data_offset(source: SourceFile, info: zipfile.ZipInfo) -> int:
    """Find the offset of a stored member's bytes; the local header may be longer than the central one."""
    header = bytes(source.copy(info.header_offset, _LOCAL_HEADER.size).numpy())
    magic, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if magic != b"PK\x03\x04":
        raise CheckpointError(f"member {info.filename!r} of {str(source.path)!r} has no header: damaged zip")
    return info.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)


def _refuse_tar(path: Path) -> NoReturn:
    raise CheckpointError(
        f"{str(path)!r} is a tar file of torch before 0.1.10. Open it with torch.load of torch 1.x and save it "
        "again with torch.save."
    )


def _refuse_bare_pickle(path: Path) -> NoReturn:
    raise CheckpointError(
        f"{str(path)!r} is a bare pickle, not a file of torch.save. Open it in an environment you trust and save "
        "its tensors with torch.save or safetensors.torch.save_file."
    )


TORCH_ZIP = Format(
    suffixes=(".bin", ".pt", ".pth", ".ckpt"),
    matches=lambda path, head: head.startswith((b"PK\x03\x04", b"PK\x05\x06")),
    open=open_torch_zip,
)
TORCH_LEGACY = Format(
    suffixes=(), matches=lambda path, head: head.startswith(_LEGACY_MAGIC), open=open_torch_legacy
)
TORCH_TAR = Format(
    suffixes=(), matches=lambda path, head: b"ustar" in head or head.startswith(b"storages"), open=_refuse_tar
)
BARE_PICKLE = Format(suffixes=(), matches=lambda path, head: head.startswith(b"\x80"), open=_refuse_bare_pickle)
