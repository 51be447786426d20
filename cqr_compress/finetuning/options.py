"""Options of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cqr_compress.clustering.options import ClusterOptions
from cqr_compress.errors import SpecError
from cqr_compress.option_fields import check_fields, documented, option, option_infos, parsed

TRAINABLE = ("codebooks", "all")
CODES = ("auto", "frozen", "recluster", "reassign", "train")
DISTILL = ("outputs", "rows")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_TRAINING, _ORIGINAL, _CODES = "Training", "Original", "Codes"


@documented
@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Options of fine-tuning; the defaults were tuned empirically.

    `clustering` contains the `ClusterOptions` of reclustering and reassignment.
    """

    epochs: int = option(5, "Maximum number of epochs.", panel=_TRAINING, low=1)
    learning_rate: float = option(
        3e-4,
        "Peak learning rate of AdamW; ignored if the task makes its own optimizer.",
        panel=_TRAINING,
        above=0,
    )
    trainable: str = option(
        "codebooks", "Parameters to train; the others are frozen.", panel=_TRAINING, choices=TRAINABLE
    )
    distill: str | None = option(
        None,
        "Add distillation from the original as the teacher to the loss: KL divergence from its logits, or squared "
        "error of its rows.",
        panel=_ORIGINAL,
        choices=DISTILL,
        shown_default="none",
    )
    codes: str = option(
        "auto",
        "Updates of codes: train rows behind the codes and encode them every few steps; between epochs reassign "
        "codes, or recluster tables of one stored level; or keep codes frozen.",
        panel=_CODES,
        choices=CODES,
    )
    patience: int = option(
        3, "Consecutive evaluations without improvement until early stopping.", panel=_TRAINING, low=1
    )
    seed: int = option(0, "Random seed.", panel=_TRAINING, low=0)
    max_steps: int | None = option(
        None, "Maximum number of optimizer steps.", panel=_TRAINING, low=1, shown_default="no limit"
    )
    warmup_steps: int = option(
        50,
        "Steps of linear warm-up; the learning-rate schedule is cosine decay to a tenth of the peak.",
        panel=_TRAINING,
        low=0,
    )
    weight_decay: float = option(0.0, "Weight decay of AdamW.", panel=_TRAINING, low=0)
    gradient_accumulation_steps: int = option(
        1, "Batches of each process that one optimizer step accumulates gradients over.", panel=_TRAINING, low=1
    )
    eval_every: int | None = option(
        None, "Steps between evaluations.", panel=_TRAINING, low=1, shown_default="an epoch"
    )
    precision: str = option(
        "auto",
        "Precision of the forward pass (autocast); auto is bfloat16 on CUDA devices that support it.",
        panel=_TRAINING,
        choices=PRECISIONS,
    )
    save_every: int | None = option(
        None,
        "Steps between saved states for --resume, in addition to one after each evaluation.",
        panel=_TRAINING,
        low=1,
        shown_default="every five minutes",
    )
    refit: bool = option(
        True,
        "With the original, re-quantize its rows under Fisher-weighted error before training.",
        panel=_ORIGINAL,
    )
    distill_weight: float = option(1.0, "Weight of the distillation loss.", panel=_ORIGINAL, above=0)
    evaluate_original: bool = option(True, "Evaluate the original and report its metrics.", panel=_ORIGINAL)
    gradient_informed: bool = option(
        True, "Recluster with gradients of the loss, instead of by rows only.", panel=_CODES
    )
    codes_until: float = option(
        0.75, "Fraction of the training after which codes are frozen.", panel=_CODES, low=0, high=1
    )
    max_moved: float = option(
        0.3,
        "Maximum share of ids that one reassignment changes, in each column.",
        panel=_CODES,
        above=0,
        high=1,
    )
    pass_batches: int | None = option(
        None,
        "Maximum number of batches, in each process, of a pass that accumulates gradients.",
        panel=_CODES,
        low=1,
        shown_default="an epoch",
    )
    clustering: ClusterOptions = field(default_factory=ClusterOptions)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.codes == "train" and self.distill == "rows":
            raise SpecError("codes is 'train', which moves rows away from the original's: give distill 'outputs'")

    @classmethod
    def from_strings(cls, given: Mapping[str, str], **known: Any) -> FinetuneOptions:
        """Parse options from text, such as `epochs=3`, or `step_size=0.1` of `ClusterOptions`.

        Args:
            given: values as text, by name: fields of `FinetuneOptions`, or of `ClusterOptions`.
            **known: fields with parsed values.

        Raises:
            SpecError: an unknown name, or a value of the wrong type.
        """
        mine, theirs = option_infos(cls), option_infos(ClusterOptions)
        if unknown := sorted(set(given) - set(mine) - set(theirs)):
            raise SpecError(f"unknown option {', '.join(unknown)}: choose from {', '.join(option_names())}")
        own = {name: parsed(cls, name, text) for name, text in given.items() if name in mine}
        other = {name: parsed(ClusterOptions, name, text) for name, text in given.items() if name not in mine}
        return cls(**{**known, **own}, clustering=ClusterOptions(**other))

    def to_json(self) -> dict[str, Any]:
        """Convert all settings to a JSON object."""
        return asdict(self)


def option_names() -> list[str]:
    """List the names that `FinetuneOptions.from_strings` accepts."""
    own = [f.name for f in fields(FinetuneOptions) if f.name != "clustering"]
    return [*own, *(name for name in option_infos(ClusterOptions) if name not in own)]
