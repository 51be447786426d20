"""Hostile pickles do nothing: no call they name is made, and the tensors beside them can still be read."""

import builtins
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import cqr_compress as cqr
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import CheckpointError, OutputError


class Calls:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def save_pickle(path: Path, pickled: bytes) -> None:
    """A torch zip file around a pickle, with one storage of 8 floats."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/data/0", torch.arange(8.0).numpy().tobytes())
        archive.writestr("m/version", "3\n")


def attacks(marker: Path) -> dict[str, Any]:
    touch = f"touch {marker}"
    write = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, touch),
        "os.popen": Calls(os.popen, touch),
        "eval": Calls(builtins.eval, write),
        "exec": Calls(builtins.exec, write),
        "__import__": Calls(builtins.__import__, "os"),
        "subprocess": Calls(subprocess.Popen, ["touch", str(marker)]),
        "torch.load": Calls(torch.load, str(marker)),
        "torch.hub.load": Calls(torch.hub.load, str(marker)),
        "map of eval": Calls(map, builtins.eval, [write]),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", list(attacks(Path("x"))))
def test_a_reduce_of_a_dangerous_call_does_nothing(tmp_path: Path, name: str, legacy: bool) -> None:
    marker = tmp_path / "owned"
    content = {"emb.weight": torch.ones(4, 2), "bad": attacks(marker)[name]}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert torch.equal(checkpoint.entries["emb.weight"].stored.read(), torch.ones(4, 2))
        assert any(met.path.startswith("bad") for met in checkpoint.unbuilt_objects)
    assert not marker.exists()


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def opcodes(marker: Path) -> dict[str, bytes]:
    """Hand-written programs, which no pickler would write."""
    touch = text(f"touch {marker}")
    getattr_os_system = b"cbuiltins\ngetattr\n(cos\nsystem\n" + text("__call__") + b"tR"
    return {
        "nested getattr": getattr_os_system + b"(" + touch + b"tR.",
        "getattr chain from builtins": b"cbuiltins\ngetattr\n(cbuiltins\n__dict__\n" + text("eval") + b"tR("
        + touch + b"tR.",
        "INST": b"(" + touch + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + touch + b"o.",
        "NEWOBJ": b"csubprocess\nPopen\n(" + touch + b"t\x81.",
        "STACK_GLOBAL": b"\x80\x04" + text("os") + text("system") + b"\x93(" + touch + b"tR.",
        "BUILD with a state that calls": b"ccollections\nOrderedDict\n)R(" + text("__reduce__") + b"cos\nsystem\ndb.",
        "torch-looking name": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n(" + touch + b"tR.",
        "torch-looking module": b"ctorch.hub\nload\n(" + touch + b"tR.",
        "torch storage that is a call": b"ctorch.storage\n_load_from_bytes\n(" + touch + b"tR.",
        "rebuild of something that is no storage": b"ctorch._utils\n_rebuild_tensor_v2\n((cos\nsystem\n"
        + touch + b"tK\x00(K\x02t(K\x01ttR.",
        "rebuild_from_type around a call": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\n(cos\nsystem\n("
        + touch + b"tNtR.",
    }  # fmt: skip


@pytest.mark.parametrize("name", list(opcodes(Path("x"))))
def test_a_hand_written_program_does_nothing(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "owned"
    save_pickle(tmp_path / "m.pt", opcodes(marker)[name])
    before = set(sys.modules)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "m.pt")
    assert not marker.exists()
    assert not {name for name in set(sys.modules) - before if not name.startswith("encodings")}


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0")
    + text("cpu") + b"K\x08tQK\x00(K\x04K\x02t(K\x02K\x01t\x89Nt"
)  # fmt: skip


def test_the_reader_itself_cannot_be_changed_by_a_pickle(tmp_path: Path) -> None:
    # BUILD on the rebuild function, on a tensor, and on a storage type
    states = (b"}" + text("function") + b"Ns", b"}" + text("shape") + b"K\x09s")
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", TENSOR + b"R", b"ctorch\nFloatStorage\n"):
        for state in states:
            save_pickle(tmp_path / "m.pt", target + state + b"b.")
            with pytest.raises(CheckpointError, match="attempts to modify"):
                open_checkpoint(tmp_path / "m.pt")
    save_pickle(tmp_path / "m.pt", b"}" + text("w") + TENSOR + b"Rs.")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert torch.equal(checkpoint.entries["w"].stored.read(), torch.arange(8.0).view(4, 2))


def test_a_shadowed_dict_method_is_not_called(tmp_path: Path) -> None:
    # an OrderedDict whose `items` attribute the pickle sets
    program = b"ccollections\nOrderedDict\n)R" + text("w") + TENSOR + b"Rs}" + text("items") + b"cos\nsystem\nsb."
    save_pickle(tmp_path / "m.pt", program)
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert list(checkpoint.entries) == ["w"]


def test_a_bomb_of_lists_ends_in_an_error_and_a_cycle_is_cut(tmp_path: Path) -> None:
    bomb: list[Any] = [torch.zeros(2, 2)]
    for _ in range(60):
        bomb = [bomb, bomb]
    torch.save(bomb, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="out of proportion to its file"):
        open_checkpoint(tmp_path / "m.pt")
    cycle: dict[str, Any] = {"emb.weight": torch.zeros(2, 2)}
    cycle["self"] = cycle
    torch.save(cycle, tmp_path / "c.pt")
    with open_checkpoint(tmp_path / "c.pt") as checkpoint:
        assert list(checkpoint.entries) == ["emb.weight"]


def test_a_list_repeated_many_times_is_refused_quickly(tmp_path: Path) -> None:
    inner = [0] * 20_000
    torch.save({"emb.weight": torch.zeros(2, 2), "l": [inner] * 20_000}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="out of proportion to its file"):
        open_checkpoint(tmp_path / "m.pt")


def test_a_quantized_tensor_beside_the_table_is_a_placeholder(tmp_path: Path) -> None:
    save_pickle(
        tmp_path / "m.pt",
        b"}" + text("w") + TENSOR + b"Rs" + text("q") + b"(" + text("storage") + b"ctorch\nQInt8Storage\n"
        + text("0") + text("cpu") + b"K\x08tQs.",
    )  # fmt: skip
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert list(checkpoint.entries) == ["w"]
        assert [met.class_name for met in checkpoint.unbuilt_objects] == ["torch.QInt8Storage"]


@pytest.mark.parametrize("command", ["finetune", "refit"])
@pytest.mark.parametrize("given", ["folder", "index"])
def test_no_file_of_the_original_is_replaced(tmp_path: Path, command: str, given: str) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    safetensors.torch.save_file({"emb.weight": torch.randn(2000, 8)}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"emb.weight": "a.safetensors"}})
    )
    original = folder if given == "folder" else folder / "model.safetensors.index.json"
    small = tmp_path / "small.safetensors"
    cqr.convert(original, small, method="pq", ratio=8, min_rows=0)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    task = cqr.Task(
        name="t", model=lambda: nn.Embedding(2000, 8), train_batches=lambda epoch: [], metric="m",
        loss=lambda model, batch: torch.zeros(1), evaluate=lambda model: {"m": 1.0},
    )  # fmt: skip
    output = folder / "a.safetensors"
    with pytest.raises(OutputError, match="is the checkpoint itself, or a part of it"):
        if command == "refit":
            cqr.refit(small, output, original=original, force=True)
        else:
            cqr.finetune(small, output, task, original=original, force=True)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
