#!/usr/bin/env python
"""Fine-tune and score Twins for semantic segmentation.

accelerate launch scripts/run_semseg.py examples/quickstart.yaml
accelerate launch scripts/run_semseg.py --variant svt-s --dataset_name ADEChallengeData2016 --output_dir outputs/svt-s
accelerate launch scripts/run_semseg.py --eval_only --model_name_or_path outputs/svt-s --output_dir outputs/scores
"""

import logging
import os
import sys

# Before torch is loaded: its threads sleep while they wait. Spinning, as they do otherwise, they take the cores from
# data workers or any other program, and a CPU run beside one was measured ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError  # noqa: E402

from twins_hf.training import TrainingStopped, parse_arguments, prepare_run, run  # noqa: E402


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # which tells of every file of a checkpoint
    arguments = parse_arguments(sys.argv[1:], description=__doc__.splitlines()[0])
    is_main_process = os.environ.get("RANK", "0") == "0"
    try:
        prepared = prepare_run(*arguments)
    except (ValueError, OSError, HfHubHTTPError, StrictDataclassError) as error:
        sys.exit(f"error: {error}" if is_main_process else 1)
    try:
        run(prepared)
    except TrainingStopped as error:
        if error.is_local or is_main_process:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
