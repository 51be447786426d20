"""Export compressed word vectors to the files that programs for word vectors read."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np

from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.formats.word_vectors import ABOUT, TABLE
from cqr_compress.checkpoint.output_files import atomic_file, check_outputs
from cqr_compress.progress import Progress, shown
from cqr_compress.table.blocks import row_blocks
from cqr_compress.vectors.word_vectors import Vector, load_vectors

VECTOR_SUFFIXES = (".txt", ".vec", ".bin", ".npy")


def is_word_vectors(source: str | Path) -> bool:
    """Return whether a compressed file was made of a file of word vectors."""
    with open_checkpoint(source) as checkpoint:
        return ABOUT in checkpoint.metadata


def export_vectors(
    source: str | Path, output: Path, *, force: bool, verify: bool, progress: Progress | None = None
) -> int:
    """Write words and decoded vectors: text (.txt, .vec) or binary (.bin) of word2vec, or an array (.npy).

    Vectors are those of `WordVectors`: of fastText, means with the n-grams. An array has the rows of the table
    instead, also those of n-grams; the words are written to a .words.txt file next to it.

    Returns:
        Bytes of the written file.

    Raises:
        FormatError: a damaged file.
        OutputError: the file cannot be written.
    """
    names = output.with_suffix(".words.txt")
    with shown(progress) as progress, open_checkpoint(source) as checkpoint:
        check_outputs([output, *([names] if output.suffix == ".npy" else [])], force, checkpoint.files)
        opened = CompressedFile.from_checkpoint(checkpoint)
        if verify:
            opened.verify()
        vectors, table = load_vectors(checkpoint.path), opened.table(TABLE)
        N, D = table.spec.num_embeddings, table.spec.embedding_dim
        num_rows = N if output.suffix == ".npy" else len(vectors)
        progress.start(f"writing {output.name}", num_rows, "rows")
        with atomic_file(output) as file:
            if output.suffix == ".npy":
                header = {"descr": "<f4", "fortran_order": False, "shape": (N, D)}
                np.lib.format.write_array_header_1_0(file, header)
                for start, stop in row_blocks(N, D):
                    file.write(table.decode(start, stop).float().numpy().astype("<f4").tobytes())
                    progress.advance(stop - start)
            else:
                file.write(f"{num_rows} {D}\n".encode())
                for start, rows in vectors.all_vectors():
                    _write(file, output.suffix, vectors.words[start : start + len(rows)], rows)
                    progress.advance(len(rows))
        if output.suffix == ".npy":
            with atomic_file(names) as file:
                file.write("".join(f"{word}\n" for word in vectors.words).encode())
    return output.stat().st_size


def _write(file: IO[bytes], suffix: str, words: list[str], rows: Vector) -> None:
    for word, row in zip(words, rows, strict=True):
        if suffix == ".bin":  # a space ends a word
            file.write(word.replace(" ", "_").encode() + b" " + row.astype("<f4").tobytes() + b"\n")
        else:
            file.write(f"{word} {' '.join(f'{value:.6g}' for value in row.tolist())}\n".encode())
