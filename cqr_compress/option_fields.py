"""Fields of option dataclasses: default, choices, bounds and help are defined once, in the field.

The command line derives its options from them, `check_fields` the validation and `documented` the docstring.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, TypeVar

from cqr_compress.errors import SpecError

T = TypeVar("T")


@dataclass(frozen=True)
class OptionInfo:
    """Metadata of an option besides its name, type and default.

    Attributes:
        help: one or two sentences.
        panel: heading under which the command line lists the option.
        choices: allowed values; unrestricted if empty. None is allowed if it is the default.
        low: inclusive lower bound, or None.
        high: inclusive upper bound, or None.
        above: exclusive lower bound, or None.
        metavar: placeholder of the value in a usage line, or None.
        shown_default: description of the default, if the value itself is not informative.
    """

    help: str
    panel: str = ""
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    metavar: str | None = None
    shown_default: str | None = None


def option(
    default: Any,
    help: str,
    *,
    panel: str = "",
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    metavar: str | None = None,
    shown_default: str | None = None,
) -> Any:
    """Create a dataclass field with an `OptionInfo`."""
    info = OptionInfo(help, panel, tuple(choices), low, high, above, metavar, shown_default)
    return field(default=default, metadata={"option": info})


def option_infos(cls: type) -> dict[str, OptionInfo]:
    """Return the options of a dataclass, by name."""
    return {f.name: f.metadata["option"] for f in fields(cls) if "option" in f.metadata}


def documented(cls: type[T]) -> type[T]:
    """Append the help of all options to a dataclass's docstring, as its attributes."""
    lines = ["", "", "Attributes:"]
    for name, info in option_infos(cls).items():
        default = next(f.default for f in fields(cls) if f.name == name)  # type: ignore[arg-type]
        shown = info.shown_default or ("" if default in (None, MISSING) else repr(default))
        choices = f" One of {', '.join(info.choices)}." if info.choices else ""
        default_text = f" Default: {shown}." if shown else ""
        lines += textwrap.wrap(
            f"{name}: {info.help}{choices}{default_text}", 100, initial_indent="    ", subsequent_indent="        "
        )
    cls.__doc__ = (cls.__doc__ or "").rstrip() + "\n".join(lines) + "\n"
    return cls


def check_fields(options: Any) -> None:
    """Check the values of an option dataclass against their choices and bounds.

    Raises:
        SpecError: the first invalid field, with its value and the allowed values.
    """
    for f in fields(options):
        info: OptionInfo | None = f.metadata.get("option")
        value = getattr(options, f.name)
        if info is None or (value is None and f.default is None):
            continue
        if info.choices and value not in info.choices:
            raise SpecError(f"{f.name} is {value!r}: choose from {', '.join(info.choices)}")
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if is_number:
            value = _python_number(options, f.name, str(f.type), value)
        bounded = (info.low, info.high, info.above) != (None, None, None)
        if bounded and (not is_number or not _within(value, info)):
            raise SpecError(f"{f.name} is {value!r}: give {_range_of(info)}")


def merged(cls: type[T], options: T | None, given: dict[str, Any]) -> T:
    """Build options from an object, from keyword arguments, or from an object with some fields replaced.

    Raises:
        SpecError: an object of another type, or an unknown keyword; the message lists the fields.
    """
    if options is not None and not isinstance(options, cls):
        raise SpecError(f"options is {options!r}: give {cls.__name__}, or its fields as keywords")
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    if unknown := sorted(set(given) - set(names)):
        near = difflib.get_close_matches(unknown[0], names, n=1)
        hint = f"did you mean {near[0]}? It" if near else "it"
        raise SpecError(f"{cls.__name__} has no field {', '.join(unknown)}: {hint} has {', '.join(names)}")
    held = {} if options is None else {name: getattr(options, name) for name in names}
    return cls(**{**held, **given})


def parsed(cls: type, name: str, text: str) -> Any:
    """Parse the value of a field from text, by the field's type.

    Raises:
        SpecError: the text is not a value of that type.
    """
    kinds = str(next(f.type for f in fields(cls) if f.name == name)).split(" | ")
    if "None" in kinds and text.lower() == "none":
        return None
    if "bool" in kinds:
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() in known:
            return known[text.lower()]
        raise SpecError(f"{name} is {text!r}: give true or false")
    for kind, read in (("int", int), ("float", float)):
        if kind in kinds:
            try:
                return read(text)
            except ValueError:
                continue
    if "str" in kinds:
        return text
    if "tuple[int, ...]" in kinds:
        try:
            return tuple(int(part) for part in text.split(","))
        except ValueError as e:
            raise SpecError(f"{name} is {text!r}: give whole numbers, such as 0,1") from e
    raise SpecError(f"{name} is {text!r}: give {'a whole number' if 'int' in kinds else 'a number'}")


def _python_number(options: Any, name: str, kind: str, value: Any) -> float:
    """Replace a number of another library, such as numpy's, by Python's int or float.

    Raises:
        SpecError: a fraction where the field takes whole numbers.
    """
    takes_fractions = "float" in kind
    if not takes_fractions and not isinstance(value, Integral):
        raise SpecError(f"{name} is {value!r}: give a whole number")
    number = (
        float(value)
        if takes_fractions and not isinstance(value, int)
        else value
        if takes_fractions
        else int(value)
    )
    object.__setattr__(options, name, number)
    return number


def _within(value: float, info: OptionInfo) -> bool:
    return (
        (info.low is None or value >= info.low)
        and (info.high is None or value <= info.high)
        and (info.above is None or value > info.above)
        and value not in (float("inf"), float("-inf"))
    )


def _range_of(info: OptionInfo) -> str:
    if info.above is not None:
        end = "" if info.high is None else f" and at most {info.high:.15g}"
        return f"a number above {info.above:.15g}{end}"
    if info.high is None:
        return f"a number of at least {info.low:.15g}"
    if info.low is None:
        return f"a number of at most {info.high:.15g}"
    return f"a number from {info.low:.15g} to {info.high:.15g}"
