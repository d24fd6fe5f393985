"""Fine-tuning: arguments, optimizer and schedule, and the run itself."""

from .arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from .optimization import decay_factor, parameter_groups
from .run import prepare_run, run

__all__ = [
    "DataArguments",
    "ModelArguments",
    "TrainingArguments",
    "decay_factor",
    "parameter_groups",
    "parse_arguments",
    "prepare_run",
    "run",
]
