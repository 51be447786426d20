"""Files made to hang or to fill the memory are refused soon, with one message, before they cost much."""

import json
import resource
import signal
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hostile_pickles import PICKLES, SAVERS, beside
from warm_process import WarmPython

from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import CheckpointError

HARMLESS = {"a memo of 2^28 entries", "a memo of 2^28 entries by PUT", "a string of 1 MB 20,000 times"}


def measure() -> None:
    """Open each hostile file, and print the outcome, the seconds and the growth of the peak memory as JSON."""
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside a call of C
    found = {}
    for path in sorted(folder.glob("*.pt")):
        signal.alarm(20)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, outcome = time.process_time(), "opened"
        try:
            open_checkpoint(path).close_files()
        except CheckpointError as e:
            outcome = f"{type(e).__name__}: {e}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        found[path.stem] = (outcome, time.process_time() - began, grown)
    print(json.dumps(found))


def test_each_hostile_pickle_is_refused_within_seconds_and_200_mb(tmp_path: Path, python: WarmPython) -> None:
    for kind, saver in SAVERS.items():
        for name, pickled in PICKLES.items():
            if kind == "zip" or len(pickled) < 2**18:  # a file of its size, if it is not compressed
                saver(tmp_path / f"{name} {kind}.pt", pickled)
    ran = python(__file__, tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) > 1.5 * len(PICKLES)
    for name, (outcome, seconds, grown) in found.items():
        assert (outcome == "opened") == (name.rpartition(" ")[0] in HARMLESS), (name, outcome)
        assert seconds < 5 and len(outcome) < 600, (name, seconds, outcome)
        assert grown < 200, (name, grown)


def test_an_honest_list_of_300_000_strings_and_100_modules_are_opened(tmp_path: Path) -> None:
    vocabulary = [f"token{i}" for i in range(300_000)]
    config = {"sizes": list(range(1000)), "names": {(i, str(i)): i for i in range(1000)}}
    layers = {f"layer{i}": {"w": torch.zeros(2, 2), "config": config, "flags": {True, None}} for i in range(100)}
    torch.save({"emb.weight": torch.zeros(4, 2), "vocabulary": vocabulary, **layers}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert len(checkpoint.entries) == 101
    torch.save({"emb.weight": torch.zeros(4, 2), "ids": {f"t{i}": i for i in range(20_000)}}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as stored, zipfile.ZipFile(tmp_path / "d.pt", "w") as deflated:
        for info in stored.infolist():
            pickled = info.filename.endswith(".pkl")
            deflated.writestr(info.filename, stored.read(info), zipfile.ZIP_DEFLATED if pickled else None)
    with open_checkpoint(tmp_path / "d.pt") as checkpoint:
        assert list(checkpoint.entries) == ["emb.weight"]


@pytest.mark.parametrize("kind", list(SAVERS))
def test_a_name_of_a_file_imports_nothing(tmp_path: Path, kind: str) -> None:
    for i, name in enumerate(("_inductor", "_dynamo", "onnx", "float31")):
        SAVERS[kind](tmp_path / f"{i}.pt", beside(f"ctorch\n{name}\n".encode()))
    SAVERS[kind](tmp_path / "float16.pt", beside(b"ctorch\nfloat16\n"))
    before = set(sys.modules)
    for path in sorted(tmp_path.iterdir()):
        with open_checkpoint(path) as checkpoint:
            assert len(checkpoint.unbuilt_objects) == (path.stem != "float16")
    assert set(sys.modules) == before


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_module_and_a_quantized_tensor_are_read_in_both_formats(tmp_path: Path, legacy: bool) -> None:
    module = torch.nn.ModuleDict({"emb": torch.nn.Embedding(4, 2), "out": torch.nn.Linear(2, 2)})
    quantized = {
        kind: torch.quantize_per_tensor(torch.ones(5, 3), 0.1, 2, kind)
        for kind in (torch.quint8, torch.qint8, torch.qint32)
    }
    torch.save(module, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert list(checkpoint.entries) == list(module.state_dict())
        assert torch.equal(checkpoint.entries["emb.weight"].stored.read(), module["emb"].weight.detach())
    content = {"q": quantized, "emb.weight": torch.arange(8.0).view(4, 2)}
    torch.save(content, tmp_path / "q.pt", _use_new_zipfile_serialization=not legacy)
    with open_checkpoint(tmp_path / "q.pt") as checkpoint:
        assert torch.equal(checkpoint.entries["emb.weight"].stored.read(), content["emb.weight"])
        assert len(checkpoint.entries) == 1 and len(checkpoint.unbuilt_objects) == 3


if __name__ == "__main__":
    measure()
