"""Small pickles that hang or fill the memory of a reader without limits, by what they do."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path


def text(value: str) -> bytes:
    """The opcode of a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def storage(key: bytes = text("0")) -> bytes:
    """A persistent id of 8 floats with the given opcodes as its key."""
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + key + text("cpu") + b"K\x08tQ"


def integer(value: int) -> bytes:
    """The opcode of an integer of any size."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<I", len(data)) + data


def sizes(*values: int) -> bytes:
    """A tuple of integers."""
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(shape: bytes = sizes(4, 2), stride: bytes = sizes(2, 1), storage: bytes = storage()) -> bytes:
    """A tensor over the 8 floats."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + stride + b"\x89NtR"


def doubled(start: bytes, pair: bytes, levels: int = 60) -> bytes:
    """Opcodes of a container that holds the one before twice, so that it has 2^levels parts."""
    return start + b"".join(b"q\x010h\x01h\x01" + pair for _ in range(levels))


def equal_hashes(num: int) -> list[bytes]:
    """Tuples of equal hashes, which are those of the integers -1 and -2 in any order."""
    minus = b"J\xff\xff\xff\xff", b"J\xfe\xff\xff\xff"
    return [b"(" + b"".join(minus[i >> bit & 1] for bit in range(12)) + b"t" for i in range(num)]


TUPLES = doubled(b")", b"\x86")
LISTS = b"]" + b"".join(b"q\x010](h\x01h\x01e" for _ in range(60))
TENSOR = tensor()


def beside(value: bytes) -> bytes:
    """A dict of a tensor and another value."""
    return b"}(" + text("w") + TENSOR + text("x") + value + b"u."


PICKLES: dict[str, bytes] = {
    "shared tuples as a key": beside(b"}" + TUPLES + b"Ns"),
    "shared tuples in a set": beside(b"cbuiltins\nset\n](" + TUPLES + b"e\x85R"),
    "shared tuples in a frozenset": beside(b"\x80\x04(" + TUPLES + b"\x91"),
    "shared tuples as keys of an OrderedDict": beside(b"ccollections\nOrderedDict\n](" + TUPLES + b"N\x86e\x85R"),
    "shared tuples as a key of a placeholder": beside(b"ca\nb\n)R" + TUPLES + b"Ns"),
    "a tuple 100,000 deep as a key": beside(b"})" + b"\x85" * 100_000 + b"Ns"),
    "shared lists as a persistent id": beside(LISTS + b"Q"),
    "shared lists as a name": beside(b"cbuiltins\ngetattr\n(ca\nb\n" + LISTS + b"tR"),
    "shared lists as the key of a storage": beside(storage(LISTS) + b"0N"),
    "shared lists as a shape": beside(tensor(shape=LISTS)),
    "shared lists as a size": beside(tensor(shape=b"(" + LISTS + b"K\x01t")),
    "shared lists as a flag of a tensor": beside(TENSOR[:-4] + b"\x89N}" + TUPLES + b"NstR"),
    "a memo of 2^28 entries": beside(b"Nr\xff\xff\xff\x0f"),
    "a memo of 2^28 entries by PUT": beside(b"Np268435455\n"),
    "4 GB of one value": beside(tensor(sizes(2**26, 8), sizes(0, 0))),
    "2^40 rows of one value": beside(tensor(sizes(2**40, 8), sizes(0, 0))),
    "2^200 rows": beside(tensor(sizes(2**200, 8), sizes(0, 0))),
    "rows of 2^33": beside(tensor(sizes(2000, 2**33), sizes(0, 0))),
    "an empty tensor of 2^60 columns": beside(tensor(sizes(0, 2**60), sizes(1, 1))),
    "a stride of 2^70": beside(tensor(sizes(8, 1), sizes(1, 2**70))),
    "a tensor of 100,000 dimensions": beside(tensor(b"(" + b"K\x01" * 100_000 + b"t", b"(" + b"K\x01" * 100_000 + b"t")),
    "1,000 tensors of 16 MB": b"}("
    + b"".join(text(f"w{i}") + tensor(sizes(2**19 - i, 8), sizes(0, 0)) for i in range(1000))
    + b"u.",
    "a string of 1 MB 20,000 times": beside(b"](" + text("a" * 2**20) + b"q\x01" + b"h\x01" * 20_000 + b"e"),
    "a key of 1 MB above 20,000 placeholders": beside(
        b"](" + text("a" * 2**20) + b"q\x010ca\nb\nq\x020" + b"}h\x01h\x02)Rs" * 20_000 + b"e"
    ),
    "30 million lists": beside(b"(" + b"]" * 30_000_000 + b"l"),
    "8 million lists": beside(b"(" + b"]" * 8_000_000 + b"l"),
    "60,000 calls of placeholders": beside(b"ca\nb\n" + b")Rq\x010h\x01" * 60_000),
    "a class of 1 MB": beside(b"\x80\x04" + text("a" * 2**20) + text("b") + b"\x93"),
    "20,000 copies of a list": beside(
        b"](" + b"N" * 100_000 + b"eq\x010(" + b"cbuiltins\nset\nq\x020" + b"h\x02h\x01\x85R" * 20_000 + b"l"
    ),
    "20,000 calls with 100,000 arguments": beside(
        b"(" + b"N" * 100_000 + b"tq\x010ca\nb\nq\x020(" + b"h\x02h\x01R" * 20_000 + b"l"
    ),
    "20,000 copies of a list by OBJ": beside(
        b"](" + b"N" * 100_000 + b"eq\x010](" + b"cbuiltins\ntuple\nq\x020" + b"(h\x02h\x01o" * 20_000 + b"e"
    ),
    "20,000 copies of a list by INST": beside(
        b"](" + b"N" * 100_000 + b"eq\x010](" + b"(h\x01ibuiltins\ntuple\n" * 20_000 + b"e"
    ),
    "20,000 copies of a list as a tensor of a subclass": beside(
        b"](" + b"N" * 100_000 + b"eq\x010(cbuiltins\ntuple\nNh\x01\x85Ntq\x020]("
        + b"ctorch._tensor\n_rebuild_from_type_v2\nh\x02R" * 20_000 + b"e"
    ),
    "equal nested frozensets as keys": beside(
        b"\x80\x04}" + (b"(N\x91" + b"q\x010(h\x01h\x01\x85\x91" * 60 + b"Ns") * 2
    ),
    "numbers of the memo of equal hashes": beside(
        b"N" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(20_000))
    ),
    "a key of 999 parts 20,000 times": beside(
        b"(" + b"N" * 998 + b"tq\x010}" + b"h\x01Ns" * 20_000
    ),
    "keys of equal hashes": beside(b"}(" + b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(50_000)) + b"u"),
    "tuples of equal hashes": beside(b"}(" + b"".join(key + b"N" for key in equal_hashes(3000)) + b"u"),
    "tuples of equal hashes in a set": beside(b"cbuiltins\nset\n](" + b"".join(equal_hashes(3000)) + b"e\x85R"),
    "tuples of equal hashes in many dicts": beside(
        b"(" + b"".join(b"}" + key + b"Ns" for key in equal_hashes(3000)) + b"l"
    ),
    "a tuple of 999 parts above 4,000 tensors": beside(
        b"](" + TENSOR + b"q\x010" + b"h\x01" * 4000 + b"eq\x010(" + b"N" * 998 + b"tq\x020h\x01"
        + b"q\x010}h\x02h\x01s" * 190
    ),
    "an integer of 1 MB": beside(integer(2 ** (8 * 2**20 - 8))),
    "shared placeholders": beside(b"ca\nb\n)R" + b"q\x010ca\nb\nh\x01h\x01\x86R" * 60),
    "shared modules": beside(
        b"ca\nb\n)R" + b"".join(
            b"q\x010ca\nb\n)R}(" + text("_parameters") + b"}" + text("_modules") + b"}(" + text("a") + b"h\x01"
            + text("b") + b"h\x01uub" for _ in range(60)
        )
    ),
    "a shared dict of state": beside(
        b"}(" + b"".join(text(f"{i}") + b"N" for i in range(50_000)) + b"uq\x010(" + b"ca\nb\n)Rh\x01b" * 3000 + b"l"
    ),
    "keys of one name": beside(b"}(" + b"".join(b"C\x02" + struct.pack("<H", i) + TENSOR for i in range(20_000)) + b"u"),
    "extension codes": beside(b"\x82\x01"),
}  # fmt: skip


def save(path: Path, pickled: bytes) -> None:
    """A torch zip file around a pickle, with one storage of 8 floats."""
    with zipfile.ZipFile(path, "w") as archive:
        compression = zipfile.ZIP_DEFLATED if len(pickled) > 2**16 else zipfile.ZIP_STORED
        archive.writestr("m/data.pkl", pickled, compression)
        archive.writestr("m/data/0", struct.pack("<8f", *range(8)))
        archive.writestr("m/version", "3\n")


def save_legacy(path: Path, pickled: bytes) -> None:
    """A legacy torch file around a pickle, with one storage of 8 floats."""
    file = io.BytesIO()
    file.write(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.")
    file.write(pickled.replace(b"K\x08tQ", b"K\x08NtQ"))
    file.write(b"\x80\x02](" + text("0") + b"e." + struct.pack("<q8f", 8, *range(8)))
    path.write_bytes(file.getvalue())


SAVERS: dict[str, Callable[[Path, bytes], None]] = {"zip": save, "legacy": save_legacy}
