"""Limits of what a file may cost to open, so that a small file cannot fill the memory or run for ever."""

from __future__ import annotations

from dataclasses import dataclass

from cqr_compress.errors import FormatError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits for one file, most of them in proportion to its size on disk.

    Honest files stay far below: each opcode of a pickle takes at least one byte of the file, and its object at
    most about 20 bytes of memory per byte of pickle (short strings in a list, small tuples); the bytes of the
    tensors come on top. The constant parts are for pickles that a zip archive has compressed: 10^5 tensors are
    described by 10 MB of pickle.

    Attributes:
        memory: estimated bytes of the objects of all pickles, see `budgeted_unpickler`.
        pickle_bytes: bytes of all pickles after decompression.
        tensor_bytes: bytes of all tensors together, which can be more than those of the storages: tensors can
            overlap, and a tensor with stride 0 repeats values.
        structure_bytes: bytes of the nesting and plain values as JSON, which a compressed file stores.
    """

    memory: int
    pickle_bytes: int
    tensor_bytes: int
    structure_bytes: int = 16 * 2**20

    @classmethod
    def for_file(cls, nbytes: int) -> Budget:
        """Return the limits of a file of `nbytes` bytes."""
        return cls(
            memory=32 * 2**20 + 32 * nbytes,
            pickle_bytes=16 * 2**20 + 4 * nbytes,
            tensor_bytes=64 * 2**20 + 8 * nbytes,
        )


MAX_DEPTH = 200
"""Levels of nested containers or modules."""
MAX_KEY_PARTS = 1000
"""Parts of a tuple that is a key of a dict or a member of a set, each counted as often as it occurs."""
MAX_INTEGER_BYTES = 1024
"""Bytes of an integer; Python writes those of the states of random number generators in at most 20."""
MAX_KEY_INTEGER = 2**60
"""Integers above have equal hashes too easily: a dict of n such keys can take n^2 steps."""
MAX_EQUAL_HASHES = 16
"""Different keys with the same hash, such as (-1, -2) and (-2, -1): a dict of n of them takes n^2 steps."""
MAX_MEMO_DIGITS = 10
"""Decimal digits of a number of the memo."""
MAX_NAME = 1000
"""Letters of the name of a class or storage."""
MAX_DIMENSIONS = 64
MAX_SIZE = 2**48
"""Size, stride or offset of a tensor."""


class Meter:
    """What is left of a file's budget.

    Attributes:
        budget: the limits.
        where: path of the file, for messages.
        memory: bytes left of `budget.memory`.
        tensor_bytes: bytes left of `budget.tensor_bytes`.
    """

    def __init__(self, budget: Budget, where: str) -> None:
        self.budget = budget
        self.where = where
        self.memory = budget.memory
        self.tensor_bytes = budget.tensor_bytes

    def spend(self, nbytes: int) -> None:
        """Count bytes of objects.

        Raises:
            FormatError: more than the budget.
        """
        self.memory -= nbytes
        if self.memory < 0:
            raise FormatError(
                f"the pickle in {self.where!r} builds objects of more than {self.budget.memory >> 20} MiB, out of "
                "proportion to its file: it is damaged or made to exhaust memory"
            )

    def spend_tensor(self, nbytes: int) -> None:
        """Count the bytes of a tensor.

        Raises:
            FormatError: more than the budget.
        """
        self.tensor_bytes -= nbytes
        if self.tensor_bytes < 0:
            raise FormatError(
                f"the tensors of {self.where!r} have more than {self.budget.tensor_bytes >> 20} MiB together, out "
                "of proportion to its file: it is damaged or made to exhaust memory"
            )
