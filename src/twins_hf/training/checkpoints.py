"""Checkpoints of a run: written whole or not at all, checked before they are used, and the oldest removed."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError

logger = get_logger(__name__)

MANIFEST = "manifest.json"


class TrainingStopped(RuntimeError):
    """
    A run that ended before its last iteration; the message says why and how to go on.

    Attributes:
        exit_code: What the program should end with.
        is_local: Whether this process alone knows of it.
    """

    def __init__(self, message: str, exit_code: int = 1, is_local: bool = False):
        super().__init__(message)
        self.exit_code = exit_code
        self.is_local = is_local


def is_death_of_worker(error: Exception) -> bool:
    """Whether a data worker was killed; torch raises this in the main process wherever that happens to be."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


@dataclasses.dataclass
class Progress:
    """
    What a checkpoint knows beside weights, optimizer, schedule and random states.

    Attributes:
        step: Iterations that are done.
        position: Crops that all processes together have taken from the training stream.
        nonfinite: Iterations that were left out since their loss was not finite.
        best_mean_iou: The highest of all evaluations.
        history: A dictionary for each report: `step` and `train/...` or `eval/...` figures.
    """

    step: int = 0
    position: int = 0
    nonfinite: int = 0
    best_mean_iou: float = -1.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def state_dict(self) -> dict:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders of checkpoints, oldest first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("-")[-1]))


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, limit: int) -> Path:
    """
    Writes `checkpoint-<step>`, under another name first, and leaves the newest `limit` checkpoints (0: all).

    Raises:
        `TrainingStopped`: if it cannot be written; the checkpoints before it are as they were.
    """
    folder, partial = output_dir / f"checkpoint-{step}", output_dir / f".partial-checkpoint-{step}"
    if accelerator.is_main_process:
        if not output_dir.is_dir():
            logger.warning(f"{output_dir} is gone: it was removed or moved while the run went on. It is made anew.")
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_manifest(partial)
            put_in_place(partial, folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        if is_death_of_worker(error):
            raise
        raise TrainingStopped(f"{folder} cannot be written: {error}") from error
    logger.info(f"Saved {folder}")
    if accelerator.is_main_process:
        for old in checkpoint_folders(output_dir)[: -limit if limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def put_in_place(partial: Path, folder: Path) -> None:
    """Renames a folder that is whole, in place of an older one if there is one."""
    if folder.is_dir():
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old)
    else:
        os.replace(partial, folder)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Has a folder written under another name and puts it in place when it is whole."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    put_in_place(partial, folder)


def write_manifest(folder: Path) -> None:
    """Notes size and digest of every file, once all of them are on the disk."""
    manifest = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
            digest = sha_fileobj(file).hex()
        manifest[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as half a sentence; `None` if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes in place of {expected['size']}"
        with path.open("rb") as file:
            if sha_fileobj(file).hex() != expected["sha256"]:
                return f"the content of {name} has changed"
    return None


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None, accelerator: Accelerator) -> Path | None:
    """
    Folder of the checkpoint to go on from; the same in every process.

    Args:
        output_dir: The run's folder.
        resume_from_checkpoint: A checkpoint's folder; `"latest"`, the newest in `output_dir` that is whole, or none if
            there is none yet, so that the command of a run that may be stopped at any time can be given again; `None`.
        accelerator: The run's.

    Raises:
        `ValueError`: if the folder that was named is missing or damaged.
    """
    if resume_from_checkpoint is None:
        return None
    found: list = [None, None]  # the checkpoint, and a problem with it
    if accelerator.is_main_process:
        if resume_from_checkpoint == "latest":
            found[0] = newest_whole_checkpoint(output_dir)
        else:
            found[0] = Path(resume_from_checkpoint)
            found[1] = find_damage(found[0]) if found[0].is_dir() else "there is no such folder"
    checkpoint, problem = broadcast_object_list(found)
    if problem:
        raise ValueError(f"--resume_from_checkpoint {checkpoint}: {problem}.")
    return checkpoint


def newest_whole_checkpoint(output_dir: Path) -> Path | None:
    for folder in reversed(checkpoint_folders(output_dir)):
        problem = find_damage(folder)
        if problem is None:
            return folder
        logger.warning(f"Skipped {folder}: {problem}.")
    logger.warning(f"{output_dir} has no whole checkpoint to go on from: the run starts at iteration 1.")
    return None
