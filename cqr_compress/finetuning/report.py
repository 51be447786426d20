"""Report of fine-tuning, for users and for the file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cqr_compress.checkpoint.size_report import SizeReport
from cqr_compress.finetuning.early_stopping import Evaluation


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """Result of fine-tuning.

    Attributes:
        task: name of the task.
        metric: name of the metric that selected the best weights.
        mode: "max" or "min".
        dense: metrics of the original, or None if it was not evaluated.
        before: metrics of the given file.
        after: metrics of the written file.
        improved: whether any evaluation was better than the first; if not, the given weights were written.
        summary: the result in one sentence, with the reason why training ended.
        best_step: optimizer step of the written weights.
        steps: total number of optimizer steps.
        history: all evaluations.
        log: lines that were logged.
        options: all settings.
        seconds: duration.
        size: size report of the written file.
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
        """Convert to a JSON object."""
        values = {name: value for name, value in asdict(self).items() if name != "size"}
        size = {} if self.size is None else {"size": self.size.to_json()}
        return {"kind": "tuning_report", "schema_version": 2, **values, **size}

    def in_file(self) -> dict[str, Any]:
        """Return the part that is stored in the file's metadata."""
        kept = ("task", "metric", "mode", "dense", "before", "after", "improved", "summary", "best_step", "steps")
        return {name: getattr(self, name) for name in kept}
