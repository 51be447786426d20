"""What is asked of a fine-tuning."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from cqr_compress.clustering.options import ClusterOptions
from cqr_compress.errors import SpecError

TRAIN = ("codebooks", "all")


CODES = ("auto", "frozen", "recluster", "reassign")


DISTILL = ("outputs", "rows")


PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """How a model is fine-tuned; the defaults were chosen by measurement.

    Attributes:
        epochs: passes over the training data, at most.
        max_steps: steps of the optimizer, at most; None for no limit.
        learning_rate: of AdamW, at its height; not of an optimizer that the task makes.
        warmup_steps: steps in which the learning rate rises to its height; it falls as a cosine to a tenth at the
            end.
        weight_decay: of AdamW.
        accumulate: batches of each process whose gradients make one step.
        train: "codebooks", or "all" parameters of the model.
        eval_every: steps between evaluations; None for one after each epoch.
        patience: evaluations in a row without a better one after which training stops.
        codes: "frozen"; "recluster" tables of one stored level between epochs; "reassign" codes between epochs;
            "auto" to reassign where all codes are stored, recluster where others are hashed, and freeze them
            where the losses of examples are not known.
        informed: whether clusterings are gradient-informed; without it, rows themselves are clustered.
        until: part of the training after which codes rest.
        max_moved: share of ids that a reassignment may move, in each column.
        pass_batches: batches of a pass for clusterings and refits, at most, in each process; None for an epoch.
        refit: with a teacher, fit its rows anew before training, where errors cost as much as the task says.
        distill: with a teacher, add its "outputs" or "rows" to the loss, or None.
        distill_weight: of what is added.
        precision: of forward and backward; "auto" is bfloat16 on CUDA devices that have it, float32 elsewhere.
        seed: of every random choice.
        save_every: steps between states that `resume` can go on from, besides one at each evaluation; None for one
            in five minutes.
        clustering: of `recluster` and `reassign`.
    """

    epochs: int = 5
    max_steps: int | None = None
    learning_rate: float = 3e-4
    warmup_steps: int = 50
    weight_decay: float = 0.0
    accumulate: int = 1
    train: str = "codebooks"
    eval_every: int | None = None
    patience: int = 3
    codes: str = "auto"
    informed: bool = True
    until: float = 0.75
    max_moved: float = 0.3
    pass_batches: int | None = None
    refit: bool = True
    distill: str | None = None
    distill_weight: float = 1.0
    precision: str = "auto"
    seed: int = 0
    save_every: int | None = None
    clustering: ClusterOptions = field(default_factory=ClusterOptions)

    def __post_init__(self) -> None:
        choices = {"train": TRAIN, "codes": CODES, "precision": PRECISIONS, "distill": (None, *DISTILL)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SpecError(f"{name} is {getattr(self, name)!r}: choose from {', '.join(map(str, allowed))}")
        counts = ("epochs", "max_steps", "accumulate", "eval_every", "patience", "pass_batches", "save_every")
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise SpecError(f"{name} is {value}: it is at least 1")
        if not self.learning_rate > 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise SpecError("learning_rate is above 0, warmup_steps and weight_decay are at least 0")
        if not 0 <= self.until <= 1 or not 0 < self.max_moved <= 1 or not self.distill_weight > 0:
            raise SpecError("until and max_moved are shares from 0 to 1, distill_weight is above 0")

    def to_json(self) -> dict[str, Any]:
        """All settings, as JSON has them."""
        return asdict(self)
