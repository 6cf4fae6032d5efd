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

from .catalog import AUTHORS_REPOSITORY, RESULTS
from .check import check_all, check_folder
from .convert import DTYPES, convert
from .export import FORMATS, export
from .publish import publish
from .sources import list_sources


def run_convert(args: argparse.Namespace) -> int:
    """Convert one file; says what it was."""
    print(convert(args.file, args.out, args.weights, args.dtype, args.license, args.overwrite))
    print(f'load it: timm.create_model("local-dir:{args.out}", pretrained=True)')
    return 0


def run_sources(args: argparse.Namespace) -> int:
    """List a repository of checkpoints, and the catalogue."""
    for line in list_sources(args.repo):
        print(line)
    return 0


def run_publish(args: argparse.Namespace) -> int:
    """Show, and with --yes do it."""
    for line in publish(args.folder, args.repo, args.yes, args.tag, args.private, args.results):
        print(line)
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Check all hosted and bundled entries, or folders; 1 if one failed."""
    if args.folders:
        for folder in args.folders:
            print(f"{folder}: {check_folder(folder)}")
        return 0
    lines, failed = check_all()
    print("\n".join(lines))
    return 1 if failed else 0


def run_export(args: argparse.Namespace) -> int:
    """Write a model for other programs."""
    print(export(args.model, args.file, args.format))
    return 0


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hub", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("convert", help="a checkpoint -> a folder that anyone loads in one line")
    command.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help=".pth, .pth.tar or .safetensors of the official code, of the recipes or of timm's train.py and "
        "avg_checkpoints.py; or the folder of a run",
    )
    command.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    command.add_argument("--weights", choices=["ema", "model"], help="averaged or trained; default: averaged if there")
    command.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the tensors (%(default)s)")
    command.add_argument("--license", metavar="ID", help="of the weights (what the file's header says, else unknown)")
    command.add_argument("--overwrite", action="store_true", help="replace a folder that a conversion wrote")
    command.set_defaults(run=run_convert)

    command = commands.add_parser("sources", help="the files of the authors' repository, and the state of every entry")
    command.add_argument("--repo", default=AUTHORS_REPOSITORY, metavar="ORG/NAME", help="(%(default)s)")
    command.set_defaults(run=run_sources)

    command = commands.add_parser("publish", help="show what an upload to the Hub would change; --yes uploads")
    command.add_argument("folder", metavar="OUT", type=Path, help="written by convert")
    command.add_argument("--repo", metavar="ORG/NAME", required=True)
    command.add_argument("--yes", action="store_true", help="upload")
    command.add_argument("--tag", metavar="REVISION", help="name of the revision; default: the next of v1, v2, ...")
    command.add_argument("--private", action="store_true", help="if the repository is created")
    command.add_argument(
        "--results", metavar="CSV", type=Path, default=RESULTS, help="of python -m eval, for the card"
    )
    command.set_defaults(run=run_publish)

    command = commands.add_parser(
        "check", help="sha256, names and golden answers of all hosted and bundled entries, or of folders"
    )
    command.add_argument("folders", metavar="OUT", nargs="*", type=Path, help="written by convert")
    command.set_defaults(run=run_check)

    command = commands.add_parser("export", help="a backbone as ONNX or pt2, checked; or under the authors' names")
    command.add_argument("model", metavar="MODEL", help="entry, ORG/NAME, folder or file")
    command.add_argument("file", metavar="FILE", type=Path, help="to write to")
    command.add_argument("--format", choices=FORMATS, default="onnx", help="(%(default)s)")
    command.set_defaults(run=run_export)
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
