#!/usr/bin/env python
"""Fine-tune and score Twins for semantic segmentation.

accelerate launch scripts/run_semseg.py examples/quickstart.yaml
accelerate launch scripts/run_semseg.py --variant svt-s --dataset_name ADEChallengeData2016 --output_dir outputs/svt-s
accelerate launch scripts/run_semseg.py --eval_only --model_name_or_path outputs/svt-s --output_dir outputs/scores
"""

import logging
import sys

from accelerate import PartialState
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError

from twins_hf.training import parse_arguments, prepare_run, run


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    arguments = parse_arguments(sys.argv[1:], description=__doc__)
    try:
        prepared = prepare_run(*arguments)
    except (ValueError, OSError, HfHubHTTPError, StrictDataclassError) as error:
        sys.exit(f"error: {error}" if PartialState().is_main_process else 1)
    run(prepared)


if __name__ == "__main__":
    main()
