"""Result of a sweep: sizes, and what each costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cqr_compress.checkpoint.size_report import SizeReport

SCHEMA_VERSION = 1
RECALL = "recall@10"
"""The metric of a sweep without a task."""


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One size of a sweep.

    Attributes:
        ratio: bytes of the tables before / after that was asked for; of each table, or of all tables together.
        file: the compressed file, in the folder of the sweep.
        file_bytes: its size.
        relative_mse: relative squared error of the tables, weighted by their bytes.
        recall_at_10: recall@10 of the tables, weighted by their bytes.
        metrics: metrics of the task, or None without a task.
        loss: change of the metric for the worse, relative to the dense model: 0.01 is 1%.
        interval: 95% interval of the loss over the examples; None for a metric that is only a number.
        finetuned: whether the file is fine-tuned.
        seconds: time of conversion, fine-tuning and evaluation.
    """

    ratio: float
    file: str
    file_bytes: int
    relative_mse: float
    recall_at_10: float
    metrics: Mapping[str, float] | None
    loss: float
    interval: tuple[float, float] | None
    finetuned: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """Result of `sweep`.

    Attributes:
        source: the dense checkpoint.
        dense_bytes: bytes of its model, without the state of an optimizer.
        task: name of the task, or None.
        metric: name of the metric: the task's, or recall@10 of the rows.
        mode: "max" or "min".
        dense: metrics of the dense model, or None without a task.
        max_loss: largest loss that was allowed, or None.
        points: the sizes, by ascending ratio.
        chosen: index of the smallest file with an allowed loss, or None.
        infeasible: ratios that no layout fits, with the reason.
        output: the file that the chosen one was copied to, or None.
        report: size report of the chosen file, or None.
    """

    source: str
    dense_bytes: int
    task: str | None
    metric: str
    mode: str
    dense: Mapping[str, float] | None
    max_loss: float | None
    points: list[SweepPoint]
    chosen: int | None = None
    infeasible: Mapping[str, str] = field(default_factory=dict)
    output: str | None = None
    report: SizeReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        values = {name: value for name, value in asdict(self).items() if name != "report"}
        report = None if self.report is None else self.report.to_json()
        return {"kind": "sweep_report", "schema_version": SCHEMA_VERSION, **values, "report": report}
