#!/usr/bin/env python
"""Score checkpoints by the published protocol and set them beside the published numbers.

accelerate launch scripts/compare_checkpoints.py svt-s-ade20k twins_pcpvt-s_fpn.pth --dataset_name ADEChallengeData2016
"""

import argparse
import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: waiting threads sleep

from accelerate import Accelerator  # noqa: E402

from twins_hf.data import load_segmentation_data  # noqa: E402
from twins_hf.results import results_table, score_checkpoint  # noqa: E402


def main() -> None:
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints", nargs="+", help="folders, files or Hub model ids, as convert_checkpoint.py takes"
    )
    parser.add_argument("--dataset_name", required=True, help="dataset, as run_semseg.py takes it")
    parser.add_argument("--max_eval_samples", type=int, help="use only the first so many validation images")
    parser.add_argument(
        "--single_scale", action="store_true", help="leave out multi-scale + flip, which takes 17 times as long"
    )
    parser.add_argument("--use_cpu", action="store_true", help="run on the CPU even where there is a GPU")
    parser.add_argument("--out", default="results.md", help="file to write, defaults to %(default)s")
    args = parser.parse_args()

    accelerator = Accelerator(cpu=args.use_cpu)
    out = Path(args.out)
    try:
        data = load_segmentation_data(args.dataset_name)
        if args.max_eval_samples is not None:
            rows = data.splits["validation"]
            data.splits["validation"] = rows.select(range(min(args.max_eval_samples, len(rows))))
        log_folder = out.with_name(f".{out.name}-in-progress")
        results = [
            score_checkpoint(checkpoint, data, accelerator, not args.single_scale, log_folder)
            for checkpoint in args.checkpoints
        ]
        if accelerator.is_main_process:
            out.write_text(results_table(results, data), encoding="utf-8")
            print(f"wrote {out}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}" if accelerator.is_main_process else 1)
    accelerator.end_training()


if __name__ == "__main__":
    main()
