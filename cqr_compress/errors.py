"""Exceptions of the package: each inherits from `CqrCompressError` and from the closest builtin exception."""

from __future__ import annotations

_SHOWN_LETTERS = 80


def brief(value: object) -> str:
    """Represent a value from a file in a message: at most 80 letters of a string or number, else its type.

    The `repr` of nested containers can be exponentially long, and that of an integer of 5,000 digits is refused.
    """
    if isinstance(value, str):
        return repr(value if len(value) <= _SHOWN_LETTERS else f"{value[:_SHOWN_LETTERS]}...")
    if isinstance(value, int) and value.bit_length() > 4 * _SHOWN_LETTERS:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


class CqrCompressError(Exception):
    """Base class of all exceptions that this package raises."""


class CqrCompressWarning(UserWarning):
    """A condition that a user should know of and that does not stop the operation."""


class CheckpointError(CqrCompressError, ValueError):
    """A file cannot be read as a checkpoint, or its header does not match its content."""


class FormatError(CheckpointError):
    """A compressed file is damaged, or was written by a newer version than this one."""


class TableNotFoundError(CqrCompressError, LookupError):
    """A selection of tables matches nothing."""


class TableRefusedError(CqrCompressError, ValueError):
    """A table exists, but its compressed form could not be used."""


class ShapeError(CqrCompressError, ValueError):
    """Shapes do not match."""


class BudgetError(CqrCompressError, ValueError):
    """No layout of the method fits the requested number of bytes."""


class NonFiniteError(CqrCompressError, ValueError):
    """A table contains NaN or infinity."""


class SpecError(CqrCompressError, ValueError):
    """A setting, or a combination of settings, is invalid."""


class OutputExistsError(CqrCompressError, FileExistsError):
    """The output file already exists."""


class OutputError(CqrCompressError, OSError):
    """The output cannot be written."""


class VerificationError(CqrCompressError, RuntimeError):
    """A file read back after writing differs from what was written."""


class RowIndexError(CqrCompressError, IndexError):
    """An id is out of the range of the table's rows."""


class WeightWriteError(CqrCompressError, TypeError):
    """An attempt to write to the rows of a compressed table, which are read-only."""


class SwapError(CqrCompressError, ValueError):
    """A compressed file does not match a model; nothing was changed."""


class TaskError(CqrCompressError, ValueError):
    """A task is invalid, or its data do not match it."""


class UserCodeError(CqrCompressError, RuntimeError):
    """An exception in a user's task file; the message contains its traceback."""


class StateError(CqrCompressError, ValueError):
    """A saved state that a run cannot be resumed from."""


class ProcessError(CqrCompressError, RuntimeError):
    """A process that measures one of several sizes ended without a result."""
