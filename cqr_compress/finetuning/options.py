"""What is asked of a fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cqr_compress.clustering.options import ClusterOptions
from cqr_compress.errors import SpecError
from cqr_compress.option_fields import check_fields, documented, option, option_infos, parsed

TRAINABLE = ("codebooks", "all")
CODES = ("auto", "frozen", "recluster", "reassign")
DISTILL = ("outputs", "rows")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_TRAINING, _ORIGINAL, _CODES = "Training", "Original", "Codes"


@documented
@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """How a model is fine-tuned; the defaults were chosen by measurement.

    `clustering` holds the `ClusterOptions` of reclusterings and reassignments.
    """

    epochs: int = option(5, "Passes over the training data, at most.", panel=_TRAINING, low=1)
    learning_rate: float = option(
        3e-4, "Highest learning rate of AdamW; not of an optimizer that the task makes.", panel=_TRAINING, above=0
    )
    trainable: str = option(
        "codebooks", "What is trained; the rest is frozen.", panel=_TRAINING, choices=TRAINABLE
    )
    distill: str | None = option(
        None,
        "Add distillation from the original as a teacher to the loss: KL of its logits, or error of its rows.",
        panel=_ORIGINAL,
        choices=DISTILL,
        shown_default="none",
    )
    codes: str = option(
        "auto",
        "Between epochs: reassign codes, recluster tables of one stored level, or keep codes frozen.",
        panel=_CODES,
        choices=CODES,
    )
    patience: int = option(
        3, "Evaluations in a row without a better one after which training stops.", panel=_TRAINING, low=1
    )
    seed: int = option(0, "Seed of every random choice.", panel=_TRAINING, low=0)
    max_steps: int | None = option(
        None, "Optimizer steps, at most.", panel=_TRAINING, low=1, shown_default="no limit"
    )
    warmup_steps: int = option(50, "Steps of linear warm-up; a cosine to a tenth follows.", panel=_TRAINING, low=0)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", panel=_TRAINING, low=0)
    gradient_accumulation_steps: int = option(
        1, "Batches of each process whose gradients make one step.", panel=_TRAINING, low=1
    )
    eval_every: int | None = option(
        None, "Steps between evaluations.", panel=_TRAINING, low=1, shown_default="an epoch"
    )
    precision: str = option(
        "auto",
        "Precision of forward and backward; auto is bfloat16 on CUDA devices that have it.",
        panel=_TRAINING,
        choices=PRECISIONS,
    )
    save_every: int | None = option(
        None,
        "Steps between states that a killed run resumes from, besides one at each evaluation.",
        panel=_TRAINING,
        low=1,
        shown_default="one in five minutes",
    )
    refit: bool = option(
        True,
        "With the original, re-quantize its rows under Fisher-weighted error before training.",
        panel=_ORIGINAL,
    )
    distill_weight: float = option(1.0, "Weight of the distillation loss.", panel=_ORIGINAL, above=0)
    evaluate_original: bool = option(True, "Load the dense model and report its metrics.", panel=_ORIGINAL)
    gradient_informed: bool = option(True, "Recluster by gradients, not by rows alone.", panel=_CODES)
    codes_until: float = option(0.75, "Part of the training after which codes stay.", panel=_CODES, low=0, high=1)
    max_moved: float = option(
        0.3, "Share of ids that one reassignment may move, in each column.", panel=_CODES, above=0, high=1
    )
    pass_batches: int | None = option(
        None,
        "Batches of a pass that gathers gradients, at most, in each process.",
        panel=_CODES,
        low=1,
        shown_default="an epoch",
    )
    clustering: ClusterOptions = field(default_factory=ClusterOptions)

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_strings(cls, given: Mapping[str, str], **known: Any) -> FinetuneOptions:
        """Read options from text, such as `epochs=3` and, of the clustering, `step_size=0.1`.

        Args:
            given: values as text, by name: fields of `FinetuneOptions`, or of `ClusterOptions`.
            **known: fields that have their values.

        Raises:
            SpecError: an unknown name, or a value of another type.
        """
        mine, theirs = option_infos(cls), option_infos(ClusterOptions)
        if unknown := sorted(set(given) - set(mine) - set(theirs)):
            raise SpecError(f"there is no option {', '.join(unknown)}: choose from {', '.join(option_names())}")
        own = {name: parsed(cls, name, text) for name, text in given.items() if name in mine}
        other = {name: parsed(ClusterOptions, name, text) for name, text in given.items() if name not in mine}
        return cls(**{**known, **own}, clustering=ClusterOptions(**other))

    def to_json(self) -> dict[str, Any]:
        """All settings, as JSON has them."""
        return asdict(self)


def option_names() -> list[str]:
    """Every name that `FinetuneOptions.from_strings` takes."""
    own = [f.name for f in fields(FinetuneOptions) if f.name != "clustering"]
    return [*own, *(name for name in option_infos(ClusterOptions) if name not in own)]
