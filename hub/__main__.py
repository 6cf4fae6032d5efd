"""Weights: convert checkpoints, publish them, check what is published, export models.

python -m hub convert checkpoint.pth OUT
python -m hub publish OUT --repo ORG/NAME
python -m hub check
python -m hub export OUT model.onnx --format onnx
python -m hub sources
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from arm_zoo.files import CheckpointError

from .convert import DTYPES, convert


def run_convert(args: argparse.Namespace) -> int:
    """Convert one file; says what it was."""
    print(convert(args.file, args.out, args.weights, args.dtype, args.license, args.overwrite))
    print(f'load it: timm.create_model("local-dir:{args.out}", pretrained=True)')
    return 0


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hub", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("convert", help="a .pth or .safetensors -> a folder that anyone loads in one line")
    command.add_argument("file", metavar="FILE", type=Path, help="of the official code, or of this project")
    command.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    command.add_argument("--weights", choices=["ema", "model"], help="averaged or trained; default: averaged if there")
    command.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the tensors (%(default)s)")
    command.add_argument("--license", default="unknown", metavar="ID", help="of the weights (%(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace a folder that a conversion wrote")
    command.set_defaults(run=run_convert)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What a person can mend is one line on stderr."""
    args = create_parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except (CheckpointError, OSError, ValueError) as error:
        lines = (str(error) or type(error).__name__).splitlines()
        print(f"error: {'; '.join(line.strip() for line in lines)}".replace(":; ", ": "), file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
