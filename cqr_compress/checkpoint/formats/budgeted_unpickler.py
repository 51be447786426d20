"""An unpickler that counts what each opcode costs, and refuses a pickle that costs more than a budget.

The unpickler in C cannot be limited: one opcode allocates a memo of 2^28 entries, and the hash of a dict's key
that is a tuple of shared tuples takes exponential time inside one call. This one is the standard library's
implementation in Python, which takes about three times as long for the opcodes.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Protocol

from cqr_compress.checkpoint.formats.budget import (
    MAX_EQUAL_HASHES,
    MAX_INTEGER_BYTES,
    MAX_KEY_INTEGER,
    MAX_KEY_PARTS,
    MAX_MEMO_DIGITS,
    Meter,
)
from cqr_compress.errors import FormatError, brief

_COSTS = {
    **dict.fromkeys((pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT1, pickle.DUP), 16),
    **dict.fromkeys((pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.EMPTY_DICT, pickle.LIST, pickle.MARK), 80),
    **dict.fromkeys((pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3), 80),
    **dict.fromkeys((pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET), 240),
    **dict.fromkeys((pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.UNICODE, pickle.BINUNICODE8), 64),
    **dict.fromkeys((pickle.BINPUT, pickle.LONG_BINPUT, pickle.PUT, pickle.MEMOIZE), 96),
    **dict.fromkeys((pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.OBJ, pickle.INST), 320),
    **dict.fromkeys((pickle.REDUCE, pickle.BINPERSID, pickle.PERSID), 640),
    **dict.fromkeys((pickle.GLOBAL, pickle.STACK_GLOBAL), 2000),
}
_OTHER_COST = 32
PART_COST = 8
"""Cost of a part of a key, which takes its time at every use of the key."""
_COST = [_COSTS.get(bytes([opcode]), _OTHER_COST) for opcode in range(256)]
"""Bytes of memory of the object that an opcode makes, on a 64-bit machine, rounded up."""


class KeyCheck:
    """Check of the keys of all dicts and the members of all sets of a file, which is named in messages."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._by_hash: dict[int, list[Any]] = {}

    def check(self, keys: Iterable[Any]) -> int:
        """Refuse keys whose hashes or comparisons could take long; return the number of their parts.

        Strings count as no parts: their hashes are stored in them, and nobody can compute equal ones in advance.

        Raises:
            FormatError: a key of more than 1,000 parts, an integer of more than 60 bits, or more than 16 different
                keys with the same hash.
        """
        parts = 0
        for key in keys:
            if type(key) is not str:
                parts += num_parts(key, self._where)
                if type(key) not in _OWN_HASHES:
                    self._check_hash(key)
        return parts

    def _check_hash(self, key: Any) -> None:
        try:
            found = self._by_hash.setdefault(hash(key), [])
        except TypeError:  # an unhashable key, which no dict takes
            return
        if key not in found:
            found.append(key)
        if len(found) > MAX_EQUAL_HASHES:
            raise FormatError(
                f"{self._where!r} has more than {MAX_EQUAL_HASHES} keys of dicts with the same hash: it is "
                "damaged or made to take long"
            )


_OWN_HASHES = (int, bool, type(None), bytes)
"""Types of keys whose hashes differ, if they are small integers, or cannot be computed in advance."""


def num_parts(key: Any, where: str) -> int:
    """Count the parts of a key of a dict, or a member of a set: each hash of a key visits all of them.

    Raises:
        FormatError: more than 1,000 parts, or an integer of more than 60 bits.
    """
    stack, parts = [key], 0
    while stack:
        part = stack.pop()
        parts += 1
        if isinstance(part, int) and not -MAX_KEY_INTEGER < part < MAX_KEY_INTEGER:
            raise FormatError(f"a key of a dict in {where!r} is an integer of {part.bit_length()} bits")
        if isinstance(part, (tuple, frozenset)):
            stack.extend(islice(part, MAX_KEY_PARTS))
        if parts > MAX_KEY_PARTS:
            raise FormatError(f"a key of a dict in {where!r} has more than {MAX_KEY_PARTS} parts")
    return parts


class Readable(Protocol):
    """A file that a pickle is read from."""

    def read(self, nbytes: int, /) -> bytes:
        """Read `nbytes` bytes, or those that are left."""

    def readline(self) -> bytes:
        """Read a line."""


class _CountingDispatch(dict[int, Callable[[Any], None]]):
    """The functions of the opcodes; each look-up is counted."""

    def __init__(self, functions: dict[int, Callable[[Any], None]], meter: Meter) -> None:
        super().__init__(functions)
        self._meter = meter

    def __getitem__(self, opcode: int) -> Callable[[Any], None]:
        meter = self._meter
        meter.memory -= _COST[opcode]
        if meter.memory < 0:
            meter.spend(0)
        return _get_function(self, opcode)


_FUNCTIONS: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch
_get_function = dict.__getitem__


class BudgetedUnpickler(pickle._Unpickler):
    """The unpickler of the standard library with a budget.

    Args:
        file: the pickle; exactly its bytes are read. Its `read` of a declared length must not allocate more than
            there is.
        meter: what is left of the budget.
    """

    def __init__(self, file: Readable, meter: Meter) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.meter = meter
        self.keys = KeyCheck(meter.where)
        self.dispatch = _CountingDispatch(_DISPATCH, meter)  # type: ignore[misc]  # of this file's meter


def _load_long4(self: Any) -> None:
    nbytes = int.from_bytes(self.read(4), "little", signed=True)
    if not 0 <= nbytes <= MAX_INTEGER_BYTES:
        raise FormatError(f"the pickle in {self.meter.where!r} has an integer of {nbytes} bytes")
    self.append(pickle.decode_long(self.read(nbytes)))


def _load_put(self: Any) -> None:
    digits = self.readline()[:-1]
    if len(digits) > MAX_MEMO_DIGITS or not digits.isdigit():
        raise FormatError(
            f"the pickle in {self.meter.where!r} memoizes an object under {brief(digits.decode('latin-1'))}"
        )
    self.memo[int(digits)] = self.stack[-1]


def _load_bytearray8(self: Any) -> None:
    self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))


def _load_setitem(self: Any) -> None:
    value, key = self.stack.pop(), self.stack.pop()
    self.meter.spend(PART_COST * self.keys.check((key,)))
    self.stack[-1][key] = value


def _load_setitems(self: Any) -> None:
    items = self.pop_mark()
    self.meter.spend(PART_COST * self.keys.check(items[::2]))
    target = self.stack[-1]
    for i in range(0, len(items), 2):
        target[items[i]] = items[i + 1]


def _load_dict(self: Any) -> None:
    items = self.pop_mark()
    self.meter.spend(PART_COST * self.keys.check(items[::2]))
    self.append({items[i]: items[i + 1] for i in range(0, len(items), 2)})


def _load_additems(self: Any) -> None:
    items = self.pop_mark()
    self.meter.spend(PART_COST * self.keys.check(items))
    for item in items:
        self.stack[-1].add(item)


def _load_frozenset(self: Any) -> None:
    items = self.pop_mark()
    self.meter.spend(PART_COST * self.keys.check(items))
    self.append(frozenset(items))


def _check_call(self: Any) -> None:
    """Refuse a call whose arguments are no tuple, and count what it copies of them."""
    function, arguments = self.stack[-2:]
    if not isinstance(arguments, tuple):
        raise FormatError(f"the pickle in {self.meter.where!r} calls with arguments that are no tuple")
    copied = len(arguments)
    if not isinstance(function, type):  # functions of the reader make sets and tuples of their arguments
        copied += 10 * sum(len(argument) for argument in arguments if isinstance(argument, (list, tuple)))
    self.meter.spend(8 * copied)


def _load_reduce(self: Any) -> None:
    _check_call(self)
    _FUNCTIONS[pickle.REDUCE[0]](self)


def _load_newobj(self: Any) -> None:
    _check_call(self)
    _FUNCTIONS[pickle.NEWOBJ[0]](self)


def _load_obj(self: Any) -> None:
    arguments = self.pop_mark()
    self.stack += [arguments.pop(0), tuple(arguments)]
    _load_reduce(self)


def _load_inst(self: Any) -> None:
    module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
    arguments = tuple(self.pop_mark())
    self.stack += [self.find_class(module, name), arguments]
    _load_reduce(self)


def _load_newobj_ex(self: Any) -> None:
    self.stack.pop()  # keyword arguments, which no object of the reader has
    _load_newobj(self)


def _load_build(self: Any) -> None:
    state, target = self.stack.pop(), self.stack[-1]
    if isinstance(target, OrderedDict):  # attributes such as `_metadata` of a state_dict
        return
    target.__setstate__(state)


def _refuse(self: Any) -> None:
    raise FormatError(f"the pickle in {self.meter.where!r} uses extension codes or buffers outside the pickle")


_DISPATCH: dict[int, Callable[[Any], None]] = {
    **_FUNCTIONS,
    pickle.LONG4[0]: _load_long4,
    pickle.BYTEARRAY8[0]: _load_bytearray8,
    pickle.PUT[0]: _load_put,
    pickle.SETITEM[0]: _load_setitem,
    pickle.SETITEMS[0]: _load_setitems,
    pickle.DICT[0]: _load_dict,
    pickle.ADDITEMS[0]: _load_additems,
    pickle.FROZENSET[0]: _load_frozenset,
    pickle.REDUCE[0]: _load_reduce,
    pickle.OBJ[0]: _load_obj,
    pickle.INST[0]: _load_inst,
    pickle.NEWOBJ[0]: _load_newobj,
    pickle.NEWOBJ_EX[0]: _load_newobj_ex,
    pickle.BUILD[0]: _load_build,
    **dict.fromkeys((code[0] for code in (pickle.EXT1, pickle.EXT2, pickle.EXT4)), _refuse),
    **dict.fromkeys((code[0] for code in (pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)), _refuse),
}
