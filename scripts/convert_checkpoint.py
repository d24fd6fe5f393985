#!/usr/bin/env python
"""Convert Twins checkpoints of the authors, timm and MMSegmentation to a folder for from_pretrained, and back.

python scripts/convert_checkpoint.py pcpvt_small.pth pcpvt-s-imagenet
python scripts/convert_checkpoint.py timm/twins_svt_small.in1k svt-s-imagenet
python scripts/convert_checkpoint.py twins_svt-s_uperhead.pth svt-s-ade20k
python scripts/convert_checkpoint.py pcpvt_small.pth pcpvt_small_mmseg.pth --to mmseg
"""

import argparse
import sys

from twins_hf.conversion import SOURCES, convert_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="a .pth or .safetensors file, a folder, or a Hub model id")
    parser.add_argument("destination", metavar="DST", help="a new folder, or a .pth or .safetensors file with --to")
    parser.add_argument("--to", choices=["hf", *SOURCES], default="hf", help="whose names the result has")
    parser.add_argument("--image-size", type=int, default=224, help="side that a classifier was trained with")
    args = parser.parse_args()
    try:
        print(convert_checkpoint(args.source, args.destination, args.to, args.image_size))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
