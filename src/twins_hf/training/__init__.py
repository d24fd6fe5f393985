"""Fine-tuning: arguments, optimizer and schedule, checkpoints, and the run itself."""

from .arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments
from .checkpoints import TrainingStopped
from .optimization import decay_factor, parameter_groups
from .preparation import prepare_run
from .run import run

__all__ = [
    "DataArguments",
    "ModelArguments",
    "TrainingArguments",
    "TrainingStopped",
    "decay_factor",
    "parameter_groups",
    "parse_arguments",
    "prepare_run",
    "run",
]
