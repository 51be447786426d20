"""Word vectors in compressed files beside the field's tools, on the same vectors at the same bytes of files.

    python tests/benchmarks/word_vectors.py VECTORS [--words WORDS] [--ratios 8 16 32] [--work FOLDER]

VECTORS is anything that `convert` reads as word vectors, or a safetensors file, whose largest tensor is taken; WORDS has
a word on each line, or is a tokenizer.json. Words that are missing, not printable or have spaces get names. Ours is what
`convert` writes with its defaults at `--ratio`, and its file is the budget: a setting of another tool may take up to 8%
more. Bytes are whole files with the words in them; faiss has none, and gets ours, compressed by zlib, beside its index.

Of each tool all settings of `settings_of` are fitted, and the one with the best recall@10 is shown. Files of a work
folder that are there already are not made again. model2vec clusters once with 20 rounds, and into 3,000 clusters or fewer, in
place of ten times with up to 300, and the rotation of faiss's OPQ has 8 rounds on 10,000 words in place of 50 on all,
which take hours. navec's k-means has 20 rounds on all words, where its own default is 50 on 10,000.

Quality: mean cosine with the original vectors; recall@10 of the nearest neighbours of 2,000 words by cosine among all;
Spearman's rank correlation of the cosines of 100,000 random pairs, and of the pairs of those words with their 50
nearest neighbours. A word without a vector has cosines of 0. Vectors of fewer dimensions are those of the first ones.

Times and memory: each tool in turn in processes of their own, medians over the rounds. "load" is the time from the start
of the process to the first vector, imports included, and "open" that of opening the file alone; "MiB" is the peak
after 1,000 single lookups; then single lookups in a second, and the time of looking up 10,000 words at once.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Opened = tuple[Callable[[str], Any], Callable[[list[str]], Any]]
"""Look up a word, or several."""
Settings = dict[str, Callable[[Path], None]]
"""What makes a file, by the name of the setting."""
SLACK = 1.08
MAX_CLUSTERS = 3000
PACKAGES = {
    "cqr-compress": "cqr-compress", "compress-fasttext": "compress-fasttext", "navec": "navec",
    "model2vec": "model2vec", "gensim": "gensim", "faiss": "faiss-cpu",
}  # fmt: skip


class Source(NamedTuple):
    """Words, their vectors, and a file of them for `convert`."""

    words: list[str]
    rows: Rows
    file: Path


class Quality(NamedTuple):
    """How near vectors are to the originals."""

    cosine: float
    recall: float
    random_pairs: float
    near_pairs: float


def read_source(file: Path, words: Path | None, work: Path) -> Source:
    """Read vectors and words of any file, and write them as an array for `convert`."""
    import torch

    from cqr_compress.checkpoint.formats.open import open_checkpoint

    names: list[str] = []
    with open_checkpoint(file) as checkpoint:
        entries = checkpoint.entries
        largest = max(entries.values(), key=lambda entry: int(np.prod(entry.stored.shape)))
        rows: Rows = largest.stored.read().to(torch.float32).numpy()
        if "vocabulary" in entries:
            text = zlib.decompress(entries["vocabulary"].stored.read().numpy().tobytes())
            names = text.decode().split("\n")[:-1]
    if words is not None and words.suffix == ".json":
        vocabulary = json.loads(words.read_text(encoding="utf-8"))["model"]["vocab"]
        names = sorted(vocabulary, key=vocabulary.__getitem__)
    elif words is not None:
        names = words.read_text(encoding="utf-8").split("\n")
    seen: set[str] = set()
    for i in range(len(rows)):
        name = names[i] if i < len(names) else ""
        plain = name.isprintable() and not any(letter.isspace() for letter in name)
        if not name or not plain or name in seen:
            name = f"<token{i}>"
        names[i : i + 1] = [name]
        seen.add(name)
    source = Source(names[: len(rows)], rows, work / "source.npy")
    np.save(source.file, rows)
    source.file.with_suffix(".words.txt").write_text("\n".join(source.words) + "\n", encoding="utf-8")
    return source


def packed(words: Sequence[str]) -> bytes:
    return zlib.compress("\n".join(words).encode(), 9)


def file_bytes(path: Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    return sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size


# Settings: names of files, and what makes them


def settings_of(tool: str, source: Source, budget: int) -> Settings:
    """The settings of a tool that may fit a budget of bytes, by name."""
    return {
        "compress-fasttext": compress_fasttext_settings, "navec": navec_settings,
        "model2vec": model2vec_settings, "faiss": faiss_settings,
    }[tool](source, budget)  # fmt: skip


def powers_of_two(D: int, budget: int, N: int) -> list[int]:
    """Numbers of columns that divide D, whose codes of a byte take a third of a budget or more, and fit it."""
    return [m for m in (8, 16, 32, 64, 128, 256) if D % m == 0 and budget / 3 <= m * N <= budget]


def most_centroids(D: int, room: float) -> int:
    """Most float32 centroids that fit, up to the 255 of both libraries."""
    return min(255, int(room / (4 * D)))


def navec_settings(source: Source, budget: int) -> Settings:
    (N, D), words = source.rows.shape, len(packed(source.words))

    def make(columns: int, centroids: int, path: Path) -> None:
        from navec import Navec
        from navec.meta import Meta
        from navec.train.pq import quantize
        from navec.vocab import Vocab

        np.random.seed(0)
        pq = quantize(source.rows, columns, centroids, sample=N, iterations=20)
        pq.codes = pq.codes.astype(np.float32)
        Navec(Meta("benchmark"), Vocab(source.words, [0] * N), pq).dump(path)

    found: Settings = {}
    for columns in powers_of_two(D, budget, N):
        centroids = most_centroids(D, budget - columns * N - 1.05 * words - 10_240)
        if centroids >= 16:
            found[f"PQ {columns} x {centroids}.tar"] = functools.partial(make, columns, centroids)
    return found


def compress_fasttext_settings(source: Source, budget: int) -> Settings:
    """PQ, SVD and pruning, of a vocabulary that its order ranks, in files that gensim packs by gzip."""
    N, D = source.rows.shape

    def model() -> Any:
        from gensim.models.fasttext import FastTextKeyedVectors

        made = FastTextKeyedVectors(D, min_n=1, max_n=0, bucket=1)  # no n-grams of letters
        made.index_to_key, made.vectors = list(source.words), source.rows
        made.key_to_index = {word: i for i, word in enumerate(source.words)}
        made.vectors_ngrams = np.zeros((1, D), np.float32)
        made.expandos = {"count": np.arange(N, 0, -1)}
        return made

    def make(kind: str, kept: int, columns: int, centroids: int, path: Path) -> None:
        from compress_fasttext.compress import make_new_fasttext_model, prune_ft_freq
        from compress_fasttext.decomposition import DecomposedMatrix
        from compress_fasttext.quantization import quantize

        np.random.seed(0)
        none = np.zeros((1, D), np.float16)
        if kind == "SVD":
            small = make_new_fasttext_model(model(), DecomposedMatrix.compress(source.rows, columns), none)
        elif kept == N:
            small = make_new_fasttext_model(model(), quantize(source.rows, columns, centroids), none)
        else:
            pq = columns > 0
            small = prune_ft_freq(
                model(), kept, new_ngrams_size=1, pq=pq, qdim=max(1, columns), centroids=centroids
            )
        small.save(str(path))

    found: Settings = {}
    room = budget - 4 * N - len(packed(source.words))
    for columns in (m for m in (16, 32, 64, 128, 256) if D % m == 0):
        sizes = {c: 1.02 * columns * N * math.log2(c) / 8 + 4 * D * c for c in range(16, 256)}
        fitting = [c for c, size in sizes.items() if size <= room]
        if fitting and sizes[fitting[-1]] > room / 2:
            found[f"PQ {columns} x {fitting[-1]}.gz"] = functools.partial(make, "PQ", N, columns, fitting[-1])
    rank = int(room / (2 * N + 4 * D))
    if rank:
        found[f"SVD {rank}.gz"] = functools.partial(make, "SVD", N, rank, 0)
    columns = min((m for m in (16, 32, 64, 128, 256) if m * N > room and D % m == 0), default=0)
    if columns:
        kept = int((room - 255 * 4 * D) / columns)
        found[f"{kept} words, PQ {columns} x 255.gz"] = functools.partial(make, "PQ", kept, columns, 255)
    return found


def model2vec_settings(source: Source, budget: int) -> Settings:
    """Int8 of fewer dimensions, and of clusters of words; the words are a tokenizer.json."""
    (N, D), words = (
        source.rows.shape,
        len(json.dumps(dict.fromkeys(source.words, 99999), ensure_ascii=False).encode()),
    )
    room = budget - words - 1_000

    def make(dims: int, clusters: int, path: Path) -> None:
        import model2vec.vocabulary_quantization as vocabulary
        from model2vec import StaticModel
        from model2vec.model import quantize_model
        from sklearn.cluster import KMeans
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel

        vocabulary.KMeans = functools.partial(KMeans, n_init=1, max_iter=20)  # type: ignore[attr-defined]
        tokens = {word: i for i, word in enumerate(source.words)}
        static = StaticModel(source.rows, Tokenizer(WordLevel(tokens, unk_token=source.words[0])))
        small = quantize_model(static, clusters or None, "int8", dims if dims < D else None)
        small.save_pretrained(path)
        for unneeded in ("README.md", "modules.json"):
            (path / unneeded).unlink(missing_ok=True)

    found: Settings = {}
    dims = min(D, int(room / N))
    if dims >= 1:
        found[f"int8, {dims} dimensions"] = functools.partial(make, dims, 0)
    clusters = int((room - 8 * N) / D)
    if 1 <= clusters <= min(N // 2, MAX_CLUSTERS):
        found[f"int8, {clusters} clusters"] = functools.partial(make, D, clusters)
    return found


def faiss_settings(source: Source, budget: int) -> Settings:
    """PQ, OPQ, RQ, PRQ and scalar quantizers, the latter of fewer principal components too."""
    (N, D), words = source.rows.shape, len(packed(source.words))
    room = budget - words - 2_000

    def make(factory: str, path: Path) -> None:
        import faiss

        index: Any = faiss.index_factory(D, factory)
        if factory.startswith("OPQ"):
            rotation: Any = faiss.downcast_VectorTransform(index.chain.at(0))
            rotation.niter, rotation.max_train_points = 8, 10_000
        index.train(source.rows)
        index.add(source.rows)
        path.mkdir()
        faiss.write_index(index, str(path / "index.faiss"))
        (path / "words.zlib").write_bytes(packed(source.words))

    names = []
    for columns in (m for m in (8, 16, 32, 64, 128, 256) if D % m == 0):
        for rotation in (0, 4 * D * D):
            fitting = [b for b in (4, 5, 6, 7, 8) if N * columns * b / 8 + 4 * D * 2**b + rotation <= room]
            if fitting and N * columns * fitting[-1] / 8 > 0.6 * room:
                names.append(f"{f'OPQ{columns},' if rotation else ''}PQ{columns}x{fitting[-1]}")
    for bits in (4, 6, 8):
        if D * N * bits / 8 <= room:
            names.append(f"SQ{bits}")
        rank = int((room - 4 * D * D - 8 * D) / (N * bits / 8 + 4 * D)) // 4 * 4
        if 4 <= rank < D:
            names.append(f"PCA{rank},SQ{bits}")
    for columns in (8, 4, 1):
        layouts = [(int((room - 4 * N) / (columns * N * b / 8 + 4 * 2**b * D)), b) for b in (4, 6, 8)]
        possible = [(levels * b, levels, b) for levels, b in layouts if 2 <= levels <= 16]
        if D % columns == 0 and possible:
            _, levels, b = max(possible)
            names.append(f"RQ{levels}x{b}" if columns == 1 else f"PRQ{columns}x{levels}x{b}")
    return {name: functools.partial(make, name) for name in names}


# Opening: what a process of its own does


def open_ours(path: Path) -> Opened:
    import cqr_compress as cqr

    vectors = cqr.load_vectors(path)
    return vectors.__getitem__, vectors.__getitem__


def open_compress_fasttext(path: Path) -> Opened:
    from compress_fasttext.compress import CompressedFastTextKeyedVectors

    vectors = CompressedFastTextKeyedVectors.load(str(path))
    return vectors.__getitem__, vectors.__getitem__


def open_navec(path: Path) -> Opened:
    from navec import Navec

    vectors = Navec.load(path)
    return vectors.__getitem__, lambda words: np.stack([vectors[word] for word in words])


def open_model2vec(path: Path) -> Opened:
    from model2vec import StaticModel

    model = StaticModel.from_pretrained(path)
    return model.encode, model.encode


def open_gensim(path: Path) -> Opened:
    from gensim.models import KeyedVectors

    vectors = KeyedVectors.load(str(path / "vectors.kv"), mmap="r" if "mapped" in path.name else None)
    return vectors.__getitem__, vectors.__getitem__


def open_faiss(path: Path) -> Opened:
    import faiss

    index = faiss.read_index(str(path / "index.faiss"))
    words = zlib.decompress((path / "words.zlib").read_bytes()).decode().split("\n")
    ids = {word: i for i, word in enumerate(words)}
    return (
        lambda word: index.reconstruct(ids[word]),
        lambda words: index.reconstruct_batch(np.array([ids[word] for word in words])),
    )


OPENERS = {
    "cqr-compress": open_ours, "compress-fasttext": open_compress_fasttext, "navec": open_navec,
    "model2vec": open_model2vec, "gensim": open_gensim, "faiss": open_faiss,
}  # fmt: skip


def peak_mib() -> float:
    """Peak resident memory of this process alone (getrusage counts what it was forked from)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def child(tool: str, path: Path, words: Path, started: float) -> None:
    """Load, look up, and print the seconds to the first vector and of opening, MiB, lookups/s and batch seconds."""
    few = words.read_text(encoding="utf-8").split("\n")
    if tool == "cqr-compress":
        import cqr_compress as cqr

        _ = cqr.load_vectors
    else:
        modules = {"compress-fasttext": "compress_fasttext.compress", "gensim": "gensim.models"}
        importlib.import_module(modules.get(tool, tool))
    imported = time.time()
    one, many = OPENERS[tool](path)
    one(few[0])
    loaded = time.time()
    for word in few[:1000]:
        one(word)
    peak = peak_mib()
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        for word in few[:2000]:
            one(word)
        rates.append(2000 / (time.perf_counter() - start))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        many(few[:10_000])
        times.append(time.perf_counter() - start)
    print(loaded - started, loaded - imported, peak, max(rates), min(times))


# Quality


class Reference:
    """What is measured of the original vectors once."""

    def __init__(self, rows: Rows, queries: int = 2000, pairs: int = 100_000, near: int = 50) -> None:
        generator = np.random.default_rng(0)
        self.unit = unit_rows(rows)
        self.queries = generator.choice(len(rows), min(queries, len(rows)), replace=False)
        self.nearest = nearest(self.unit, self.queries, min(near, len(rows) - 1))
        self.random = generator.integers(len(rows), size=(2, pairs))
        self.near = np.stack([np.repeat(self.queries, self.nearest.shape[1]), self.nearest.reshape(-1)])

    def quality(self, rows: Rows) -> Quality:
        from scipy.stats import spearmanr

        found = np.zeros_like(self.unit)
        found[:, : rows.shape[1]] = rows
        found = unit_rows(found)
        best = nearest(found, self.queries, 10)
        hits = sum(len(np.intersect1d(a, b[:10])) for a, b in zip(best, self.nearest, strict=True))
        ranks = [
            float(spearmanr(cosines(self.unit, pairs), cosines(found, pairs)).statistic)
            for pairs in (self.random, self.near)
        ]
        cosine = float(np.einsum("nd,nd->n", self.unit, found).mean())
        return Quality(cosine, hits / best.size, *ranks)


def unit_rows(rows: Rows) -> Rows:
    unit: Rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-20)
    return unit


def cosines(unit: Rows, pairs: NDArray[np.int64]) -> Rows:
    found: Rows = np.einsum("nd,nd->n", unit[pairs[0]], unit[pairs[1]])
    return found


def nearest(unit: Rows, queries: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """The nearest other rows of some rows by cosine, best first."""
    found = []
    for start in range(0, len(queries), 256):
        part = queries[start : start + 256]
        scores = unit[part] @ unit.T
        scores[np.arange(len(part)), part] = -np.inf
        best = np.argpartition(-scores, number, axis=1)[:, :number]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1)
        found.append(np.take_along_axis(best, order, 1))
    return np.concatenate(found)


# The benchmark


def make_dense(source: Source, work: Path) -> Iterator[tuple[str, Path]]:
    from gensim.models import KeyedVectors

    for name, dtype in (("float32", np.float32), ("float32, mapped", np.float32), ("float16", np.float16)):
        path = work / f"gensim {name}"
        if not path.exists():
            path.mkdir()
            vectors = KeyedVectors(source.rows.shape[1], dtype=dtype)
            vectors.add_vectors(source.words, source.rows.astype(dtype))
            vectors.save(str(path / "vectors.kv"), sep_limit=0 if "mapped" in name else 2**40)
        yield name, path


def decoded(tool: str, path: Path, words: list[str]) -> Rows:
    many = OPENERS[tool](path)[1]
    blocks = [many(words[i : i + 8192]) for i in range(0, len(words), 8192)]
    found: Rows = np.concatenate(blocks).astype(np.float32)
    return found


def best_setting(
    tool: str, source: Source, budget: int, work: Path, reference: Reference, skip: tuple[str, ...]
) -> tuple[str, Path, Quality] | None:
    """Fit all settings of a tool, print them, and return the best that fits."""
    best: tuple[str, Path, Quality] | None = None
    for name, make in settings_of(tool, source, budget).items():
        if name.startswith(skip):
            continue
        path, began = work / f"{tool} {name}", time.perf_counter()
        if not path.exists():
            make(path)
        took, size = time.perf_counter() - began, file_bytes(path)
        quality = reference.quality(decoded(tool, path, source.words))
        print(
            f"  {tool:17} {name:36} {size:>10,} bytes{' (too many)' if size > budget else '':11} "
            f"{' '.join(f'{q:.4f}' for q in quality)} {took:5.0f} s",
            flush=True,
        )
        if size <= budget and (best is None or quality.recall > best[2].recall):
            best = name, path, quality
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--words", type=Path, help="words of a file that has none: lines, or a tokenizer.json")
    parser.add_argument("--ratios", type=float, nargs="+", default=[8, 16, 32])
    parser.add_argument("--tools", nargs="*", default=["compress-fasttext", "navec", "model2vec", "faiss"])
    parser.add_argument("--skip", nargs="*", default=[], help="beginnings of names of settings that are left out")
    parser.add_argument("--work", type=Path, help="folder of the files; a temporary one by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.vectors, Path(args.child[1]), float(args.child[2]))
        return
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(exist_ok=True)
        compare(read_source(args.vectors, args.words, work), args, work)


def compare(source: Source, args: argparse.Namespace, work: Path) -> None:
    import cqr_compress as cqr

    N, D = source.rows.shape
    print(f"{N} words x {D}; {', '.join(f'{p} {importlib.metadata.version(p)}' for p in PACKAGES.values())}")
    reference = Reference(source.rows)
    shown: list[tuple[str, str, str, Path, Quality]] = []
    for name, path in make_dense(source, work):
        shown.append(("", "gensim", name, path, reference.quality(decoded("gensim", path, source.words))))
    for ratio in args.ratios:
        path = work / f"ours {ratio:g}.safetensors"
        if not path.exists():
            cqr.convert(source.file, path, ratio=ratio)
        table = cqr.inspect(path).tables[0]
        assert isinstance(table, cqr.TableReport)
        label = f"{table.method} {table.layout}"
        quality = reference.quality(decoded("cqr-compress", path, source.words))
        print(f"{ratio:g}x: ours {file_bytes(path):,} bytes, {label}", flush=True)
        shown.append((f"{ratio:g}x", "cqr-compress", label, path, quality))
        for tool in args.tools:
            best = best_setting(tool, source, int(file_bytes(path) * SLACK), work, reference, tuple(args.skip))
            if best is not None:
                shown.append((f"{ratio:g}x", tool, *best))
    timed = timings([(tool, path) for _, tool, _, path, _ in shown], source, work, args.rounds)
    print("| size | tool | setting | bytes | cosine | recall@10 | random pairs | near pairs | load s | open s | MiB |"
          " lookups/s | 10,000 ms |")  # fmt: skip
    print("|---" * 13 + "|")
    for (size, tool, name, path, quality), (load, opened, peak, rate, batch) in zip(shown, timed, strict=True):
        print(
            f"| {size} | {tool} | {Path(name).stem if name.endswith(('.gz', '.tar')) else name} | {file_bytes(path):,} "
            f"| {' | '.join(f'{q:.4f}' for q in quality)} | {load:.2f} | {opened:.3f} | {peak:.0f} | {rate:,.0f} | "
            f"{batch * 1e3:.1f} |"
        )


def timings(sides: list[tuple[str, Path]], source: Source, work: Path, rounds: int) -> list[tuple[float, ...]]:
    """Medians over rounds in which each side runs in a process of its own."""
    chosen = np.random.default_rng(1).integers(len(source.words), size=10_000)
    file = work / "lookups.txt"
    file.write_text("\n".join(source.words[i] for i in chosen), encoding="utf-8")
    found: list[list[list[float]]] = [[] for _ in sides]
    for _ in range(rounds):
        for i, (tool, path) in enumerate(sides):
            command = [sys.executable, __file__, str(path), "--child", tool, str(file), repr(time.time())]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            found[i].append([float(word) for word in ran.stdout.split()])
    return [tuple(statistics.median(values) for values in zip(*runs, strict=True)) for runs in found]


if __name__ == "__main__":
    main()
