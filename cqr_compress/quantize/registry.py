"""Registry of the methods: an entry for each, with its summary, its papers and the module that implements it.

A new method needs a module with an object of the protocol `base.Method`, and an entry here. Modules are imported
when a method is first used, so that reading names, summaries and papers stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

from cqr_compress.errors import SpecError

if TYPE_CHECKING:
    from cqr_compress.quantize.base import Method


@dataclass(frozen=True)
class MethodEntry:
    """An entry of METHODS.

    Attributes:
        name: name of the method.
        module: its module in this package.
        attribute: name of the method's object in that module.
        summary: one line, used in help texts and in the README's table.
        papers: references, as pairs of a citation and a link.
    """

    name: str
    module: str
    attribute: str
    summary: str
    papers: tuple[tuple[str, str], ...] = ()


_JEGOU = ("Jegou et al. 2011", "https://doi.org/10.1109/TPAMI.2010.57")
_GE = ("Ge et al. 2013", "https://doi.org/10.1109/TPAMI.2013.240")
_CHEN = ("Chen et al. 2010", "https://doi.org/10.3390/s101211259")
_CQR = ("Tsang & Ahle 2022", "https://arxiv.org/abs/2210.05974")
_GUAN = ("Guan et al. 2019", "https://arxiv.org/abs/1911.02079")
_HASH = ("Weinberger et al. 2009", "https://doi.org/10.1145/1553374.1553516")
_TCQ = ("Marcellin & Fischer 1990", "https://doi.org/10.1109/26.46532")
_QTIP = ("Tseng et al. 2024", "https://arxiv.org/abs/2406.11235")
_QR = ("Shi et al. 2020", "https://doi.org/10.1145/3394486.3403059")

METHODS: dict[str, MethodEntry] = {
    entry.name: entry
    for entry in (
        MethodEntry(
            "auto", "auto", "AUTO", "tries layouts of trellis, pq, opq, rq and prq on a sample, keeps the best"
        ),
        MethodEntry(
            "pq",
            "additive",
            "PQ",
            "product quantization: k-means in each column; with a rotation OPQ",
            (_JEGOU, _GE),
        ),
        MethodEntry("rq", "additive", "RQ", "residual quantization with beam search: a row is a sum", (_CHEN,)),
        MethodEntry("prq", "additive", "PRQ", "residual quantization in each column", (_JEGOU, _CHEN)),
        MethodEntry(
            "trellis",
            "trellis",
            "TRELLIS",
            "trellis-coded quantization with a rate for each principal direction",
            (_TCQ, _QTIP),
        ),
        MethodEntry("cqr", "cqr", "CQR", "cluster pointers and a helper codebook, to be trained on", (_CQR,)),
        MethodEntry(
            "int8", "integers", "INT8", "8-bit integers with a scale and a zero point for each row", (_GUAN,)
        ),
        MethodEntry(
            "int4", "integers", "INT4", "4-bit integers with a scale and a zero point for each row", (_GUAN,)
        ),
        MethodEntry(
            "hash", "hashed", "HASH", "hashing trick, fitted by least squares; ids take no bytes", (_HASH,)
        ),
        MethodEntry(
            "qr", "hashed", "QR", "quotient-remainder, fitted by least squares; ids take no bytes", (_QR,)
        ),
    )
}


def method_of(name: str) -> Method:
    """Return the object of a method, by its name.

    Raises:
        SpecError: an unknown method.
    """
    entry = METHODS.get(name)
    if entry is None:
        raise SpecError(f"method {name!r} is not one of {', '.join(METHODS)}")
    return cast("Method", getattr(import_module(f"cqr_compress.quantize.{entry.module}"), entry.attribute))
