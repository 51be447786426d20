"""Fine-tuning of compressed files: training with a guard, so that nothing gets worse."""

from cqr_compress.tuning.options import FinetuneOptions
from cqr_compress.tuning.report import TuningReport
from cqr_compress.tuning.run import finetune
from cqr_compress.tuning.task import Task
from cqr_compress.tuning.task_file import load_task_file, write_template

__all__ = ["FinetuneOptions", "Task", "TuningReport", "finetune", "load_task_file", "write_template"]
