"""Rules: options of single tables, by patterns of their names."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cqr_compress.checkpoint.json_file import require_file
from cqr_compress.errors import CheckpointError, SpecError, brief
from cqr_compress.option_fields import option_infos, parsed
from cqr_compress.quantize.options import BUDGETS, ConvertOptions
from cqr_compress.quantize.registry import METHODS, method_of

KEEP = "keep"
_OF_THE_FILE = ("size", "file_ratio", "weight", "rest_dtype", "min_rows", "prior")
"""Options that a rule cannot set: they are not of a single table."""
_OF_A_METHOD = tuple(
    name
    for name, info in option_infos(ConvertOptions).items()
    if info.panel == "Method" and name not in ("method", "effort", "max_sample", "seed")
)
_NAMES = [f.name for f in fields(ConvertOptions) if f.name not in _OF_THE_FILE]
_WORD = "|".join([KEEP, *METHODS])
_ACTION = rf"(?:(?:{_WORD})|(?:{'|'.join(_NAMES)})=[^,=]+)"
_RULE = re.compile(rf"(?P<pattern>.+?)=(?P<action>{_ACTION}(?:,{_ACTION})*)")

Rules = Mapping[str, str | Mapping[str, Any]] | str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Rule:
    """Options of the tables whose names match a pattern.

    Attributes:
        pattern: a glob, or "re:" and a regular expression.
        text: the rule as it was given.
        keeps: whether the tables stay dense.
        fields: fields of `ConvertOptions` that it sets.
    """

    pattern: str
    text: str
    keeps: bool
    fields: Mapping[str, Any]

    def options(self, options: ConvertOptions) -> ConvertOptions:
        """Return the options of a table, from those of the conversion.

        Options of another method, and a budget that this rule replaces or whose size its method fixes, are not
        taken over.

        Raises:
            SpecError: an invalid value, or options that do not go together.
        """
        changes: dict[str, Any] = {}
        if self.fields.get("method", options.method) != options.method:
            changes = dict.fromkeys(_OF_A_METHOD)
        if any(name in self.fields for name in BUDGETS):
            changes |= dict.fromkeys((*BUDGETS, "weight"))
        try:
            found = replace(options, **{**changes, **self.fields})
            has_own = any(name in self.fields for name in BUDGETS)
            if not has_own and method_of(found.method).has_fixed_size(found):
                found = found.without_budget()
        except (SpecError, TypeError) as e:
            raise SpecError(f"rule {self.text!r}: {e}") from e
        return found


def read_rules(given: Rules) -> tuple[Rule, ...]:
    """Read rules.

    Args:
        given: actions by pattern; or texts PATTERN=ACTION and TOML files with a table `[rules]` of actions by
            pattern. An action is `keep`, a method, or settings such as `pq,ratio=8`; in TOML and Python also a
            mapping such as `{method = "pq", ratio = 8}`.

    Returns:
        The rules in order: the first one that matches a table holds.

    Raises:
        SpecError: an unknown action.
        CheckpointError: a file that cannot be read.
    """
    if isinstance(given, Mapping):
        return tuple(_rule(pattern, action) for pattern, action in given.items())
    rules: list[Rule] = []
    for item in [given] if isinstance(given, (str, Path)) else given:
        if isinstance(item, Path) or (item.endswith(".toml") and "=" not in item):
            rules += [_rule(pattern, action) for pattern, action in _read_toml(Path(item)).items()]
            continue
        match = _RULE.fullmatch(item)
        if match is None:
            raise SpecError(
                f"rule {item!r} is not PATTERN=ACTION: an action is {KEEP}, a method ({', '.join(METHODS)}), or "
                f"settings such as pq,ratio=8 of {', '.join(_NAMES)}"
            )
        rules.append(_rule(match["pattern"], match["action"]))
    return tuple(rules)


def _rule(pattern: str, action: str | Mapping[str, Any]) -> Rule:
    text = f"{pattern}={action if isinstance(action, str) else repr(action)[:100]}"
    if isinstance(action, str):
        values: dict[str, Any] = {}
        for part in action.split(","):
            name, equals, value = part.strip().partition("=")
            if not equals and name != KEEP:
                name, value = "method", name
            if name in values:
                raise SpecError(f"rule {text!r} sets {name} twice")
            values[name] = value
    elif isinstance(action, Mapping):
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in action.items()}
    else:
        raise SpecError(f"rule {pattern!r} has {brief(action)}: give {KEEP}, a method, or a table of settings")
    if KEEP in values:
        if isinstance(action, Mapping):
            raise SpecError(f"rule {text!r} has {KEEP} among settings: give {KEEP!r} instead of a table")
        if len(values) > 1:
            raise SpecError(f"rule {text!r} keeps tables dense: it can set nothing else")
        return Rule(pattern, text, True, {})
    unknown = [name for name in values if name not in _NAMES]
    if unknown:
        what = "is of the whole file" if unknown[0] in _OF_THE_FILE else "is no option"
        raise SpecError(f"rule {text!r} sets {unknown[0]}, which {what}: give some of {', '.join(_NAMES)}")
    try:
        values = {k: parsed(ConvertOptions, k, v) if isinstance(v, str) else v for k, v in values.items()}
    except SpecError as e:
        raise SpecError(f"rule {text!r}: {e}") from e
    if values.get("method", "auto") not in METHODS:
        raise SpecError(f"rule {text!r}: method {values['method']!r} is not {KEEP} or one of {', '.join(METHODS)}")
    return Rule(pattern, text, False, values)


def _read_toml(path: Path) -> Mapping[str, Any]:
    """Read the table `rules` of a TOML file."""
    require_file(path)
    try:
        tomllib = importlib.import_module("tomllib")  # from Python 3.11 on
    except ModuleNotFoundError as e:
        raise SpecError(
            f"TOML files require Python 3.11: give the rules of {str(path)!r} as PATTERN=ACTION"
        ) from e
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise CheckpointError(f"{str(path)!r} is TOML that is nested too deeply") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{str(path)!r} is not a TOML file: {e}") from e
    rules = values.get("rules")
    if not isinstance(rules, Mapping) or len(values) > 1:
        raise SpecError(f'{str(path)!r} has to have one table, [rules], with lines such as "emb_l.0.*" = "int8"')
    return rules
