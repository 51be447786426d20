"""Formats that are recognized, but not read: what they are, and the command that makes a readable file of them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

_TABLE_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
"""The last bytes of a table of LevelDB, the form of the index of a TensorFlow checkpoint."""
_MSGPACK_MAPS = tuple(bytes([first]) for first in (*range(0x80, 0x90), 0xDE, 0xDF))
"""The first bytes of a map of msgpack."""


@dataclass(frozen=True)
class Foreign:
    """A format of other programs.

    Attributes:
        name: what it is.
        matches: whether a path, whose first 512 bytes are given (none of a folder), has this format.
        advice: returns what makes a readable file of a path.
    """

    name: str
    matches: Callable[[Path, bytes], bool]
    advice: Callable[[Path], str]


def explain(path: Path, head: bytes) -> str | None:
    """Explain what a file or folder is and how to convert it; None if that is not known.

    Args:
        path: the file or folder.
        head: its first 512 bytes; empty for a folder.
    """
    for foreign in _FOREIGN:
        if foreign.matches(path, head):
            return f"it is {foreign.name}. {foreign.advice(path)}"
    return None


def _starts(*magics: bytes) -> Callable[[Path, bytes], bool]:
    return lambda path, head: head.startswith(magics)


def _contains(*names: str) -> Callable[[Path, bytes], bool]:
    return lambda path, head: not head and any(next(iter(path.glob(name)), None) is not None for name in names)


def _output(path: Path, suffix: str = ".safetensors") -> str:
    return _unused(path.parent / f"{path.name.split('.')[0] or 'model'}{suffix}")


def _unused(path: Path) -> str:
    """Return a path, with a number where there is a file already: a command must not replace it."""
    others = (path.with_stem(f"{path.stem}-{number}") for number in count(2))
    return str(path if not os.path.lexists(path) else next(p for p in others if not os.path.lexists(p)))


def _python(package: str, imports: str, tensors: str) -> Callable[[Path], str]:
    """Advise a line of Python with another package: `tensors` is the dict to save, with {path} in it."""

    def advice(path: Path) -> str:
        code = (
            f"{imports}; import torch; from safetensors.torch import save_file; "
            f"save_file({tensors.replace('{path}', repr(str(path)))}, {_output(path)!r})"
        )
        return f"With {package} installed, run: python -c {shlex.quote(code)}"

    return advice


def _run(command: str, packages: str = "") -> Callable[[Path], str]:
    """Advise a command with {path}, {output} (a .pt file) and {folder} in it."""

    def advice(path: Path) -> str:
        words = {"path": path, "output": _output(path, ".pt"), "folder": path.parent}
        run = f"With {packages} installed, run" if packages else "Run"
        return f"{run}: {command.format(**{name: shlex.quote(str(word)) for name, word in words.items()})}"

    return advice


def _unpack(command: str, suffix: str) -> Callable[[Path], str]:
    """Advise a command that unpacks a file; it reads its input, as it refuses files with another suffix."""

    def advice(path: Path) -> str:
        output = _unused(path.with_name(path.name.removesuffix(suffix) or "model"))
        return f"Run: {command} < {shlex.quote(str(path))} > {shlex.quote(output)}"

    return advice


def _tensorflow(prefix: Callable[[Path], Path]) -> Callable[[Path], str]:
    tensors = (
        "{n: torch.from_numpy(r.get_tensor(n)) for n, s in r.get_variable_to_dtype_map().items() if s.is_floating}"
    )
    return lambda path: _python(
        "tensorflow", f"import tensorflow as tf; r = tf.train.load_checkpoint({str(prefix(path))!r})", tensors
    )(path)


def _tensorflow_indices(folder: Path) -> list[Path]:
    """Return the indices of the TensorFlow checkpoints in a folder, whose tensors are in files beside them."""
    named = {file.name.rpartition(".data-")[0] for file in folder.glob("*.data-*-of-*")}
    return [file for name in named if (file := folder / f"{name}.index").is_file()]


def _newest_index(folder: Path) -> Path:
    """Return the prefix of the newest TensorFlow checkpoint in a folder."""
    return max(_tensorflow_indices(folder), key=lambda file: file.stat().st_mtime).with_suffix("")


def _is_tensorflow_index(path: Path, head: bytes) -> bool:
    if path.suffix != ".index" or not head:
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        return file.read() == _TABLE_END


def _is_msgpack(path: Path, head: bytes) -> bool:
    return path.suffix == ".msgpack" and head.startswith(_MSGPACK_MAPS)


def _is_onnx(path: Path, head: bytes) -> bool:
    return head[:1] == b"\x08" and path.suffix in (".onnx", ".pb", ".ort")


_HDF5 = (
    "(t := {}, h5py.File({path}).visititems(lambda n, d: t.update({n.replace('/', '.'): torch.from_numpy(d[()])}) "
    "if getattr(getattr(d, 'dtype', None), 'kind', '') == 'f' else None))[0]"
)
_GGUF = (
    "{t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) "
    "for t in gguf.GGUFReader({path}).tensors}"
)
_ONNX = (
    "{i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in onnx.load({path}).graph.initializer}"
)
_FLAX = (
    "{n: torch.from_numpy(np.array(a)) for n, a in "
    "u.flatten_dict(serialization.msgpack_restore(open({path}, 'rb').read()), sep='.').items()}"
)
_FLAX_IMPORTS = "from flax import serialization, traverse_util as u; import numpy as np"
_ORBAX = (
    "{n: torch.from_numpy(np.array(a)) for n, a in "
    "u.flatten_dict(o.PyTreeCheckpointer().restore({path}), sep='.').items()}"
)
_ORBAX_IMPORTS = "import orbax.checkpoint as o; from flax import traverse_util as u; import numpy as np"
_FOREIGN = (
    Foreign("an HDF5 file (Keras, h5py)", _starts(b"\x89HDF\r\n\x1a\n"), _python("h5py", "import h5py", _HDF5)),
    Foreign("a GGUF file (llama.cpp)", _starts(b"GGUF"), _python("gguf", "import gguf", _GGUF)),
    Foreign("an ONNX model", _is_onnx, _python("onnx", "import onnx, onnx.numpy_helper", _ONNX)),
    Foreign("a msgpack file (Flax)", _is_msgpack, _python("flax", _FLAX_IMPORTS, _FLAX)),
    Foreign(
        "the index of a TensorFlow checkpoint",
        _is_tensorflow_index,
        _tensorflow(lambda path: path.with_suffix("")),
    ),
    Foreign(
        "a SavedModel of TensorFlow",
        _contains("saved_model.pb"),
        _tensorflow(lambda p: p / "variables" / "variables"),
    ),
    Foreign(
        "a TensorFlow checkpoint",
        lambda path, head: not head and bool(_tensorflow_indices(path)),
        _tensorflow(_newest_index),
    ),
    Foreign(
        "a folder of torch.distributed.checkpoint",
        _contains("*.distcp"),
        _run("python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} {output}"),
    ),
    Foreign(
        "a checkpoint of DeepSpeed",
        _contains("zero_to_fp32.py"),
        _run("python {path}/zero_to_fp32.py {path} {path}", "deepspeed and huggingface_hub"),
    ),
    Foreign(
        "an Orbax checkpoint",
        _contains("manifest.ocdbt", "_CHECKPOINT_METADATA"),
        lambda path: _python("orbax-checkpoint and flax", _ORBAX_IMPORTS, _ORBAX)(path.absolute()),
    ),
    Foreign("compressed with gzip", _starts(b"\x1f\x8b"), _unpack("gunzip", ".gz")),
    Foreign("compressed with xz", _starts(b"\xfd7zXZ"), _unpack("unxz", ".xz")),
    Foreign("compressed with bzip2", _starts(b"BZh"), _unpack("bunzip2", ".bz2")),
    Foreign("compressed with zstd", _starts(b"\x28\xb5\x2f\xfd"), _unpack("unzstd", ".zst")),
    Foreign("a 7z archive", _starts(b"7z\xbc\xaf\x27\x1c"), _run("7z x {path}")),
    Foreign("a table of Parquet", _starts(b"PAR1"), lambda path: "It holds data, not a model."),
    Foreign(
        "a pointer of Git LFS, not the file itself",
        _starts(b"version https://git-lfs"),
        _run("git -C {folder} lfs pull"),
    ),
    Foreign(
        "a web page",
        lambda path, head: head.lstrip().lower().startswith((b"<!doctype html", b"<html")),
        lambda path: "Its download has failed: look at it in a browser.",
    ),
)


def explain_zip(path: Path, members: set[str]) -> str:
    """Explain what a zip file without a pickle of torch is, by the names of its members."""
    if "model.weights.h5" in members:
        return f"it is a model of Keras. {_run('unzip {path} model.weights.h5')(path)}, and give that file"
    return f"it may be an archive of files. {_run('unzip {path}')(path)}"
