"""A run from its start to the saved and, if asked for, uploaded model."""

import shutil
import tempfile
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import HfApi

from ..publishing import add_model_code
from .checkpoints import TrainingStopped, checkpoint_folders, is_death_of_worker
from .loop import evaluate, save_model, train
from .preparation import Run
from .report import write_model_card, write_results
from .scoring import score

logger = get_logger(__name__)


def run(prepared: Run) -> dict:
    """
    Trains (unless `--eval_only`), scores, and writes the results into the output folder: model, processor,
    `all_results.json`, `per_class.md`, the model card `README.md`, `training.png` and `overlays/`.

    Returns:
        What `all_results.json` holds.

    Raises:
        `TrainingStopped`: if the training ended before its last iteration.
    """
    args, accelerator = prepared.args, prepared.accelerator
    if accelerator.log_with:
        accelerator.init_trackers("twins_hf", config=tracked_settings(prepared))
    prepared.model.to(accelerator.device)
    if args.eval_only:
        results = score(prepared, prepared.model)
    else:
        try:
            model, results = train(prepared)
        except Exception as error:
            tell_how_to_go_on(prepared)
            if is_death_of_worker(error):
                raise TrainingStopped(str(error), is_local=True) from error
            raise
        results |= evaluate(prepared, model)
        if accelerator.is_main_process:
            save_model(prepared, model, prepared.output_dir)
            write_model_card(prepared, results)
    if accelerator.is_main_process:
        write_results(prepared, results)
        logger.info(f"Results are in {prepared.output_dir}")
        if prepared.hub_model_id is not None:
            publish(prepared.output_dir, prepared.hub_model_id)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def tell_how_to_go_on(prepared: Run) -> None:
    checkpoints = checkpoint_folders(prepared.output_dir)
    if checkpoints:
        logger.error(
            f"The run ended early; its last checkpoint is {checkpoints[-1]}. To go on, give the same command again "
            "with --resume_from_checkpoint latest."
        )
    else:
        logger.error("The run ended early, before its first checkpoint.")


def publish(output_dir: Path, hub_model_id: str) -> None:
    """Uploads the results, but for checkpoints, with the model's code beside them."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "upload"
        shutil.copytree(output_dir, folder, ignore=shutil.ignore_patterns("*checkpoint-*", "best", ".*"))
        add_model_code(folder)
        HfApi().upload_folder(repo_id=hub_model_id, folder_path=folder, commit_message="Upload by twins_hf")


def tracked_settings(prepared: Run) -> dict:
    settings = {}
    for arguments in (prepared.model_args, prepared.data_args, prepared.args):
        settings |= {name: str(value) for name, value in vars(arguments).items()}
    return settings
