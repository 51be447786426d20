"""How often the table finder is exact, over the model classes of public libraries.

    python tests/benchmarks/finder.py collect CACHE.jsonl.gz [--libraries transformers timm ...]
    python tests/benchmarks/finder.py score CACHE.jsonl.gz ... [--half development] [--mistakes]

"collect" builds the models of the installed libraries with their default sizes (recommenders with 1,100 to 2,000 ids),
large ones without memory for their weights, and keeps names, shapes and dtypes of the state_dict; it takes about 15
minutes. "score" runs the finder over them. Values are not needed.

An architecture is a module (file or folder) of a library with all of its models that can be built; it is exact if the
finder is exact on each of them. Tables are the weights of `nn.Embedding` and `nn.EmbeddingBag` (subclasses too) with
at least 1,024 rows and 2 columns that the state_dict holds; shared tensors count once. So an embedding layer that
only serves as a grid of positions or as a codebook is a table (a compressed layer can stand in its place), and a bare
parameter or buffer that the code indexes is none (nothing can stand in its place unasked).

Architectures are divided by a hash of their name. Mistakes are printed for the development half only.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import inspect
import itertools
import json
import logging
import pkgutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cqr_compress import init_empty_weights
from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.planning.find import find_tables, with_table_names

MIN_ROWS = 1024
SECONDS = 90
Models = Iterator[tuple[str, str, Callable[[], nn.Module]]]
"""Architecture, model and a function that builds it."""


def transformers_models() -> Models:
    """The bare model and every model with a head of each configuration, with its defaults."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    tasks = [n for n in sorted(dir(modeling_auto)) if n.startswith("MODEL_") and n.endswith("MAPPING_NAMES")]
    mappings = [getattr(modeling_auto, n) for n in tasks]
    for model_type, config_name in sorted(configuration_auto.CONFIG_MAPPING_NAMES.items()):
        names = {}
        for mapping in mappings:
            found = mapping.get(model_type, ())
            names |= dict.fromkeys([found] if isinstance(found, str) else found)
        # heads share a body: one of each kind is enough
        kinds = ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "ForCTC")
        chosen = [n for n in names if n.endswith(("Model", "Encoder", "Decoder"))][:1]
        chosen += [n for n in names if n.endswith(kinds)][:2]
        for name in chosen or list(names)[:1]:
            model = getattr(transformers, name, None)
            config = getattr(transformers, config_name, None)
            if model is None or config is None:
                continue
            yield model.__module__.split(".")[2], name, lambda model=model, config=config: model(config())


def timm_models() -> Models:
    """The first, the middle and the last model of each file of timm."""
    import timm

    for module in timm.list_modules():
        names = sorted(timm.list_models(module=module))
        for name in dict.fromkeys(names[i] for i in (0, len(names) // 2, -1) if names):
            yield module, name, lambda name=name: timm.create_model(name)


def torchvision_models() -> Models:
    import torchvision.models as models

    for name in models.list_models():
        builder = models.get_model_builder(name)
        module = builder.__module__.removeprefix("torchvision.models.")
        options = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
        yield module, name, lambda builder=builder, options=options: builder(weights=None, **options)


def diffusers_models() -> Models:
    from diffusers import ModelMixin

    for name, kind in _classes("diffusers.models", ModelMixin):
        yield kind.__module__.removeprefix("diffusers.models."), name, kind


def open_clip_models() -> Models:
    import open_clip

    for name in open_clip.list_models():
        if not open_clip.get_model_config(name).get("text_cfg", {}).get("hf_model_name"):
            yield name.split("-")[0], name, lambda name=name: open_clip.create_model(name, device="meta")


def torchaudio_models() -> Models:
    import torchaudio.models as models

    for name, builder in inspect.getmembers(models, inspect.isfunction):
        yield builder.__module__.removeprefix("torchaudio."), name, builder


def recbole_models() -> Models:
    """RecBole's recommenders over drawn interactions of 2,000 users and 1,500 items, and a drawn knowledge graph."""
    import numpy as np
    import scipy.sparse
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model

    # RecBole uses a method that SciPy has removed
    scipy.sparse.dok_matrix._update = lambda matrix, entries: matrix._dict.update(entries)
    folder = Path(tempfile.mkdtemp())
    (folder / "drawn").mkdir()
    random = np.random.default_rng(0)
    rows = [f"u{i % 2000}\ti{i % 1500 if i < 1500 else random.integers(1500)}\t{i}\n" for i in range(12000)]
    files = {
        "inter": "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(rows),
        "item": "item_id:token\tclass:token_seq\n" + "".join(f"i{i}\tc{i % 20} c{i % 7}\n" for i in range(1500)),
        "kg": "head_id:token\trelation_id:token\ttail_id:token\n"
        + "".join(f"e{i % 1700}\tr{i % 9}\te{random.integers(1700)}\n" for i in range(6000)),
        "link": "item_id:token\tentity_id:token\n" + "".join(f"i{i}\te{i}\n" for i in range(1500)),
    }
    for suffix, text in files.items():
        (folder / "drawn" / f"drawn.{suffix}").write_text(text)

    def make(name: str) -> nn.Module:
        negatives = {
            "distribution": "uniform",
            "sample_num": 1,
            "alpha": 1.0,
            "dynamic": False,
            "candidate_num": 0,
        }
        for sampled in (negatives, None):  # some losses want negative samples, others refuse them
            options = {"data_path": str(folder), "use_gpu": False, "show_progress": False, "load_col": None}
            try:
                config = Config(name, "drawn", config_dict={**options, "train_neg_sample_args": sampled})
                dataset = create_dataset(config)
                data_preparation(config, dataset)
                break
            except ValueError:
                if sampled is None:
                    raise
        return get_model(name)(config, dataset)

    sys.argv = sys.argv[:1]  # Config reads the command line
    for kind in ("general", "sequential", "context_aware", "knowledge_aware"):
        package = importlib.import_module(f"recbole.model.{kind}_recommender")
        for name in (n for n in dir(package) if n[0].isupper()):
            yield name, name, lambda name=name: make(name)


def deepctr_torch_models() -> Models:
    import deepctr_torch.models as models
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat

    columns = [SparseFeat("user", 2000, 16), SparseFeat("item", 1500, 16), SparseFeat("item_gender", 1100, 16)]
    history = [VarLenSparseFeat(SparseFeat("hist_item", 1500, 16, embedding_name="item"), 9, length_name="length")]
    for name, kind in inspect.getmembers(models, inspect.isclass):
        ways = (
            lambda kind=kind: kind(columns, columns),
            lambda kind=kind: kind(columns),
            lambda kind=kind: kind([*columns, *history], ["item"]),
            lambda kind=kind: kind(columns, task="binary"),
        )
        yield name, name, lambda ways=ways: _first(ways)


def torch_rechub_models() -> Models:
    from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature

    sparse = [SparseFeature("user", 2000, 16), SparseFeature("item", 1500, 16)]
    history = [SequenceFeature("hist_item", 1500, 16, pooling="concat", shared_with="item")]
    mlp = {"dims": [64, 32], "activation": "relu"}
    values = {
        "sparse_features": sparse, "dense_features": [DenseFeature("price")], "neg_history_features": history,
        "max_length": 9, "pos_item_features": sparse[1:], "hidden_dim": 16, "emb_dropout_p": 0.1, "session_rep_dropout_p": 0.1,
        "weight_std": 0.1, "emb_std": 0.1, "n_task": 2, "cvr_params": mlp, "ctr_params": mlp, "reduction_ratio": 2,
        "features": sparse, "deep_features": sparse, "fm_features": sparse, "user_features": sparse[:1],
        "item_features": sparse[1:], "history_features": history, "target_features": sparse[1:], "fwfm_features": sparse,
        "wide_features": sparse, "linear_features": sparse, "cross_features": sparse, "neg_item_feature": history,
        "item_history_feature": history[0], "mlp_params": mlp, "user_params": mlp, "item_params": mlp,
        "attention_mlp_params": mlp, "n_cross_layers": 2, "task_types": ["classification"] * 2,
        "bottom_params": mlp, "tower_params_list": [mlp] * 2, "n_expert": 2, "expert_params": mlp, "num_layers": 2,
        "user_tower_params": mlp, "item_tower_params": mlp, "vocab_size": 1500, "item_num": 1500, "item_feature": sparse[1:],
        "neg_item_features": history, "max_seq_len": 1200, "embed_dim": 16, "cross_num_layers": 2,
    }  # fmt: skip
    for part in ("ranking", "matching", "multi_task", "generative"):
        for name, kind in inspect.getmembers(
            importlib.import_module(f"torch_rechub.models.{part}"), inspect.isclass
        ):
            wanted = inspect.signature(kind).parameters.values()
            given = {p.name: values[p.name] for p in wanted if p.name in values}
            yield name, name, lambda kind=kind, given=given: kind(**given)


def pykeen_models() -> Models:
    from pykeen.models import model_resolver
    from pykeen.triples import CoreTriplesFactory

    triples = torch.randint(1500, (4000, 3))
    triples[:, 1] %= 1100
    factory = CoreTriplesFactory(triples, num_entities=1500, num_relations=1100)
    for name, kind in sorted(model_resolver.lookup_dict.items()):
        yield name, name, lambda kind=kind: kind(triples_factory=factory)


def torch_geometric_models() -> Models:
    from torch_geometric.nn import kge, models

    for name, kind in inspect.getmembers(kge, inspect.isclass):
        yield name, name, lambda kind=kind: kind(num_nodes=1500, num_relations=1100, hidden_channels=32)
    edges = torch.randint(1500, (2, 4000))
    yield "LightGCN", "LightGCN", lambda: models.LightGCN(1500, 32, 2)
    by_type = {("user", "likes", "item"): edges, ("item", "liked", "user"): edges.flip(0)}
    path = [("user", "likes", "item"), ("item", "liked", "user")]
    yield "MetaPath2Vec", "MetaPath2Vec", lambda: models.MetaPath2Vec(by_type, 32, path, 5, 5)
    yield "SchNet", "SchNet", lambda: models.SchNet()
    yield "DimeNet", "DimeNet", lambda: models.DimeNet(32, 1, 1, 4, 3, 3)
    yield "ViSNet", "ViSNet", lambda: models.ViSNet()


def x_transformers_models() -> Models:
    import x_transformers as x

    decoder = {"dim": 512, "depth": 2, "heads": 8}
    absolute = {"num_tokens": 20000, "max_seq_len": 1024}
    yield "decoder", "decoder", lambda: x.TransformerWrapper(**absolute, attn_layers=x.Decoder(**decoder))
    relative = dict(decoder, rel_pos_bias=True)
    yield "relative", "relative", lambda: x.TransformerWrapper(**absolute, attn_layers=x.Decoder(**relative))
    yield (
        "encoder",
        "encoder",
        lambda: x.TransformerWrapper(
            **absolute, tie_embedding=True, num_memory_tokens=20, attn_layers=x.Encoder(**decoder)
        ),
    )
    yield (
        "vit",
        "vit",
        lambda: x.ViTransformerWrapper(
            image_size=512, patch_size=16, num_classes=1000, attn_layers=x.Encoder(**decoder)
        ),
    )
    sides = {f"{s}_{k}": v for s in ("enc", "dec") for k, v in {**absolute, "depth": 2, "heads": 8}.items()}
    yield "xtransformer", "xtransformer", lambda: x.XTransformer(dim=512, **sides)


def vector_quantize_pytorch_models() -> Models:
    import vector_quantize_pytorch as v

    for name in (
        "VectorQuantize",
        "ResidualVQ",
        "SimVQ",
        "ResidualSimVQ",
        "RandomProjectionQuantizer",
        "GroupedResidualVQ",
    ):
        kind = getattr(v, name)
        sizes = {"dim": 64, "codebook_size": 2048}
        if "num_quantizers" in inspect.signature(kind).parameters or name.startswith(("Residual", "Grouped")):
            sizes["num_quantizers"] = 4
        if name == "GroupedResidualVQ":
            sizes["groups"] = 2
        if name == "RandomProjectionQuantizer":
            sizes["codebook_dim"] = 16
        yield name, name, lambda kind=kind, sizes=sizes: kind(**sizes)


SMALL = ("recbole", "deepctr_torch", "torch_rechub", "pykeen", "torch_geometric", "vector_quantize_pytorch")
"""Libraries whose models here are small enough for real memory."""
LIBRARIES: dict[str, Callable[[], Models]] = {
    name.removesuffix("_models"): value for name, value in list(globals().items()) if name.endswith("_models")
}


def _first(ways: Iterable[Callable[[], nn.Module]]) -> nn.Module:
    """The model of the first constructor call that works."""
    first, *others = ways
    for way in others:
        with suppress(Exception):
            return way()
    return first()


def _classes(package: str, base: type) -> Iterator[tuple[str, type]]:
    """Subclasses of `base` that the modules of a package define."""
    for info in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        try:
            module = importlib.import_module(info.name)
        except Exception:
            continue
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == info.name and issubclass(kind, base) and not inspect.isabstract(kind):
                yield name, kind


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"not built in {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def described(model: nn.Module) -> dict[str, Any]:
    """Tensors of the state_dict as [name, shape, dtype, first name of the same tensor], and names of its tables."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    tensors = []
    for name, tensor in state.items():
        if isinstance(tensor, torch.Tensor):
            same = first.setdefault(id(tensor), name)
            tensors.append([name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), same])
    tables = {
        first[id(module.weight)]
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and id(module.weight) in first
        if module.weight.shape[0] >= MIN_ROWS and module.weight.shape[1] > 1
    }
    return {"tensors": tensors, "tables": sorted(tables)}


def build(make: Callable[[], nn.Module], small: bool) -> nn.Module:
    """Build a small model as usual, others on the meta device, or where that fails with parameters on meta."""
    with time_limit(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if small:
            return make()
        try:
            with torch.device("meta"):
                return make()
        except TimeoutError:
            raise
        except Exception:
            with init_empty_weights():
                return make()


def collect(file: Path, libraries: list[str]) -> None:
    done = set()
    if file.exists():
        with gzip.open(file, "rt") as lines:
            done = {(r["architecture"], r["model"]) for r in map(json.loads, lines)}
    with gzip.open(file, "at") as out:
        for library in libraries:
            try:
                models = LIBRARIES[library]()
                first = next(models)
            except (ImportError, OSError) as e:
                print(f"{library} is left out: {e}", file=sys.stderr)
                continue
            for module, name, make in itertools.chain([first], models):
                architecture = f"{library}/{module}"
                if (architecture, name) in done:
                    continue
                done.add((architecture, name))
                record: dict[str, Any] = {"architecture": architecture, "model": name}
                try:
                    record |= described(build(make, library in SMALL))
                except (Exception, SystemExit) as e:
                    record["error"] = f"{type(e).__name__}: {e}"[:300]
                out.write(json.dumps(record) + "\n")
                print(architecture, name, record.get("error", "")[:100].replace("\n", " "), file=sys.stderr)


@dataclass(frozen=True)
class Stored:
    """Shape and dtype without values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def mistakes(record: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Tables of a model that the finder misses, and tensors that it takes wrongly."""
    entries, aliases = {}, {}
    for name, shape, dtype, same in record["tensors"]:
        if name == same:
            entries[name] = TensorEntry(name, Stored(tuple(shape), getattr(torch, dtype)))  # type: ignore[arg-type]
        else:
            aliases[name] = same
    checkpoint = Checkpoint(Path("model"), "built", entries, aliases)
    taken = {
        same
        for found in find_tables(with_table_names(checkpoint, compare=False))
        if found.selected and found.shape[0] >= MIN_ROWS
        for same in (found.name, *found.aliases)
        if same in entries
    }
    tables = set(record["tables"])
    return sorted(tables - taken), sorted(taken - tables)


def half(architecture: str) -> str:
    return ("development", "held-out")[hashlib.sha256(architecture.encode()).digest()[0] % 2]


def score(files: list[Path], only: str | None, show: bool) -> None:
    records = [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    for part in ("development", "held-out"):
        if only not in (None, part):
            continue
        outcome: dict[str, tuple[bool, bool]] = {}
        with_tables: set[str] = set()
        num_tables = 0
        for record in records:
            architecture = record["architecture"]
            if half(architecture) != part or "error" in record:
                continue
            missed, wrong = mistakes(record)
            num_tables += len(record["tables"])
            with_tables |= {architecture} if record["tables"] else set()
            before = outcome.get(architecture, (False, False))
            outcome[architecture] = (before[0] or bool(missed), before[1] or bool(wrong))
            if show and part == "development" and (missed or wrong):
                shapes = {name: (tuple(shape), dtype) for name, shape, dtype, _ in record["tensors"]}
                print(architecture, record["model"])
                for sign, names in (("missed", missed), ("wrong", wrong)):
                    for name in names[:6]:
                        print(f"    {sign} {name} {shapes[name]}", f"... {len(names)}" if len(names) > 6 else "")
        for library in ["", *sorted({a.split("/")[0] for a in outcome})]:
            chosen = [a for a in outcome if a.startswith(library)]
            report(f"{part:12} {library or 'all'}", [outcome[a] for a in chosen])
        report(f"{part:12} those with tables", [outcome[a] for a in outcome if a in with_tables])
        print(f"{part:12} {num_tables} tables in all")


def report(label: str, outcomes: list[tuple[bool, bool]]) -> None:
    exact = sum(outcome == (False, False) for outcome in outcomes)
    missed, wrong = (sum(outcome[i] for outcome in outcomes) for i in (0, 1))
    print(
        f"{label:38} {exact:4} of {len(outcomes):4} exact ({exact / max(1, len(outcomes)):6.1%}), "
        f"a table missed in {missed}, a tensor wrongly taken in {wrong}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("file", type=Path)
    collecting.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    scoring = commands.add_parser("score")
    scoring.add_argument("files", type=Path, nargs="+")
    scoring.add_argument("--half", choices=["development", "held-out"])
    scoring.add_argument("--mistakes", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.command == "collect":
        collect(args.file, args.libraries)
    else:
        score(args.files, args.half, args.mistakes)


if __name__ == "__main__":
    main()
