"""What a fine-tuning did, for people and for the file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cqr_compress.checkpoint.size_report import SizeReport
from cqr_compress.finetuning.early_stopping import Evaluation


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """What a fine-tuning did.

    Attributes:
        task: its name.
        metric: the figure that decided.
        mode: "max" or "min".
        dense: metrics of the original, where there is one that was evaluated.
        before: metrics of the file as it was given.
        after: metrics of the file that was written.
        improved: whether anything was better than what was given; if not, the given weights were written.
        summary: that in a sentence, with the reason why training ended.
        best_step: step of the weights that were written.
        steps: of the optimizer in all.
        history: every evaluation.
        log: what was said on the way.
        options: all settings.
        seconds: it took.
        size: the size report of the file that was written.
    """

    task: str
    metric: str
    mode: str
    dense: dict[str, float] | None
    before: dict[str, float]
    after: dict[str, float]
    improved: bool
    summary: str
    best_step: int
    steps: int
    history: list[Evaluation]
    log: list[str]
    options: Mapping[str, Any]
    seconds: float
    size: SizeReport | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        values = {name: value for name, value in asdict(self).items() if name != "size"}
        size = {} if self.size is None else {"size": self.size.to_json()}
        return {"kind": "tuning_report", "schema_version": 2, **values, **size}

    def in_file(self) -> dict[str, Any]:
        """What the file's metadata keep."""
        kept = ("task", "metric", "mode", "dense", "before", "after", "improved", "summary", "best_step", "steps")
        return {name: getattr(self, name) for name in kept}
