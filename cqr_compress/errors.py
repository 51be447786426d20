"""The errors a user can meet. Each inherits `CqrCompressError` and the builtin that fits it best."""

from __future__ import annotations


class CqrCompressError(Exception):
    """Base of every error that this package raises on purpose."""


class CqrCompressWarning(UserWarning):
    """Something that a user should know and that does not stop the work."""


class CheckpointError(CqrCompressError, ValueError):
    """A file cannot be read as a checkpoint, or what it says about itself does not hold."""


class FormatError(CheckpointError):
    """A compressed file is damaged, or was written by a newer version than this one."""


class TableNotFoundError(CqrCompressError, LookupError):
    """A selection of tables matches nothing."""


class TableRefusedError(CqrCompressError, ValueError):
    """A table is there, but compressing it would give a file that does not work."""


class ShapeError(CqrCompressError, ValueError):
    """Shapes that do not fit each other."""


class BudgetError(CqrCompressError, ValueError):
    """No layout of the method fits the bytes that were asked for."""


class NonFiniteError(CqrCompressError, ValueError):
    """A table holds NaN or infinity."""


class SpecError(CqrCompressError, ValueError):
    """A setting, or a combination of settings, that no table can have."""


class OutputExistsError(CqrCompressError, FileExistsError):
    """The output file is already there."""


class OutputError(CqrCompressError, OSError):
    """The output cannot be written."""


class VerificationError(CqrCompressError, RuntimeError):
    """A file read back after writing does not say what was written."""


class RowIndexError(CqrCompressError, IndexError):
    """An id names no row of the table."""


class WeightWriteError(CqrCompressError, TypeError):
    """The rows of a compressed table were written to."""


class SwapError(CqrCompressError, ValueError):
    """A compressed file and a model do not fit each other; nothing was changed."""


class TaskError(CqrCompressError, ValueError):
    """A task that fine-tuning cannot work with, or data that do not fit it."""


class UserCodeError(CqrCompressError, RuntimeError):
    """An error in a user's task file; the message is the user's own traceback."""


class StateError(CqrCompressError, ValueError):
    """A state that a run cannot go on from."""
