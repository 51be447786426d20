"""The method `auto`: layouts of trellis, pq, opq, rq and prq, of which planning selects the best on a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cqr_compress.errors import SpecError
from cqr_compress.quantize.base import LAYOUT_OPTIONS, FitEffort, Quantizer, TableFacts, TableRows, refuse_others
from cqr_compress.quantize.layouts import codebook_layouts
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.registry import method_of
from cqr_compress.table.spec import AnySpec, CodebookSpec

_N_BITS = tuple(range(1, 13))
_BITS_OF_LEVELS = range(2, 9)
"""Bits of a code of several levels."""
_MAX_LEVELS_OF_COLUMNS, _MAX_LEVELS_OF_ONE = 16, 32
_REFINE_ROUNDS, _RESTARTS = 8, 2


@dataclass(frozen=True)
class Auto:
    """All layouts whose codes are all stored; each spec has the name of the method that fits it."""

    def check(self, options: ConvertOptions) -> None:
        """Refuse a helper; all other options are supported."""
        refuse_others(options, tuple(name for name in LAYOUT_OPTIONS if name != "helper"))

    def has_fixed_size(self, options: ConvertOptions) -> bool:
        """Return False: layouts are searched within a budget."""
        return False

    def layouts(self, options: ConvertOptions, facts: TableFacts) -> Iterator[AnySpec]:
        """Iterate over layouts of all methods, with and without rotations and reduced ranks."""
        trellis, of_trellis = method_of("trellis"), options
        if options.codebook_dtype == "int8":  # of codebooks, beside trellises
            of_trellis = replace(options, codebook_dtype=None)
        try:
            trellis.check(of_trellis)
        except SpecError:  # options of codebooks
            pass
        else:
            yield from trellis.layouts(of_trellis, facts)
        if options.window is not None:
            return
        levels = (options.num_levels,) if options.num_levels else tuple(range(1, _MAX_LEVELS_OF_ONE + 1))
        for spec in codebook_layouts(
            options, facts, n_bits=_N_BITS, num_levels=levels, search_rotations=True, default_dtype="int8"
        ):
            C, L = spec.num_columns, spec.num_levels
            if C > 1 and L > _MAX_LEVELS_OF_COLUMNS and not options.num_levels:
                continue
            if L > 1 and spec.n_bits not in _BITS_OF_LEVELS and not options.n_bits:
                continue
            yield replace(spec, method="pq" if L == 1 else "rq" if C == 1 else "prq")

    def makes(self, spec: AnySpec) -> bool:
        """Return False: a spec names the method that fits it."""
        return False

    def effort(self, spec: AnySpec, refine_rounds: int | None) -> FitEffort:
        """Return the effort of the spec's method, at least 2 restarts, and 8 rounds if `refine_rounds` is None."""
        effort = method_of(spec.method).effort(spec, refine_rounds)
        if not isinstance(spec, CodebookSpec):
            return effort
        rounds = max(effort.refine_rounds, _REFINE_ROUNDS) if refine_rounds is None else effort.refine_rounds
        return replace(effort, refine_rounds=rounds, restarts=max(effort.restarts, _RESTARTS))

    def num_steps(self, spec: AnySpec, effort: FitEffort) -> int:
        """Return the number of steps of the spec's own method."""
        return method_of(spec.method).num_steps(spec, effort)

    def fit(self, rows: TableRows, spec: AnySpec, effort: FitEffort, step: Callable[[], None]) -> Quantizer:
        """Fit a spec with the method that it names."""
        return method_of(spec.method).fit(rows, spec, effort, step)


AUTO = Auto()
