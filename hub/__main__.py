"""Weights: convert checkpoints, check them, publish them, and export models."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from arm_zoo.command_line import guarded, show
from arm_zoo.weights.hosted import ARM_REPOSITORY
from hub.catalog import FROZEN, RESULTS
from hub.check import check
from hub.convert import DTYPES, convert
from hub.doctor import doctor
from hub.export import FORMATS, export
from hub.publish import publish
from hub.upstream import list_sources

EXAMPLES = """
start here:
  python -m hub convert checkpoint.pth OUT            a folder that timm.create_model("local-dir:OUT") loads
  python -m hub check OUT                             load it and compare its golden answers
  python -m hub doctor arm_large                      find out why pretrained=True fails
  python -m hub publish OUT --repo ORG/NAME           show what an upload to the Hub would change
  python -m hub export OUT model.onnx                 write a program for onnxruntime
  python -m hub COMMAND --help                        the options of a command
"""


def create_parser() -> ArgumentParser:
    """The options of a command have the names of its function's parameters."""
    parser = ArgumentParser(
        prog="python -m hub", description=__doc__, epilog=EXAMPLES, formatter_class=RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, run: Callable[..., Iterable[str]], help: str) -> ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run)
        return command

    command = add("convert", convert, "turn a checkpoint into a folder that anyone can load in one line")
    what = ".pth, .pth.tar or .safetensors of the official code, the recipes or timm's train.py and avg_checkpoints.py"
    command.add_argument("file", metavar="FILE", type=Path, help=f"{what}; or the folder of a run")
    command.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    command.add_argument(
        "--weights", choices=["ema", "model"], help="averaged or trained weights; default: averaged, if there are any"
    )
    command.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="type of the tensors (%(default)s)")
    command.add_argument("--license", metavar="ID", help="licence of the weights; default: the file's, else unknown")
    command.add_argument("--overwrite", action="store_true", help="replace a folder that a conversion wrote")

    command = add("sources", list_sources, "list every entry, and what the authors' files on the Hub are")
    command.add_argument("--repo", default=ARM_REPOSITORY, metavar="ORG/NAME", help="the authors' (%(default)s)")

    command = add(
        "doctor", doctor, "check each step on the way to an entry's weights: what it got and what it expected"
    )
    command.add_argument("entry", metavar="ENTRY", help="as `python -m arm_zoo list` shows it")
    command.add_argument("--fetch", action="store_true", help="fetch the weights too, and load them")

    command = add("publish", publish, "show what an upload to the Hub would change; --yes uploads")
    command.add_argument("folder", metavar="OUT", type=Path, help="a folder that convert wrote")
    command.add_argument("--repo", metavar="ORG/NAME", required=True, help="repository on the Hub")
    command.add_argument("--yes", action="store_true", help="upload")
    command.add_argument("--tag", metavar="REVISION", help="name of the revision; default: the next of v1, v2, ...")
    command.add_argument("--private", action="store_true", help="make the repository private, if it is created")
    license = "licence of the weights; --yes needs it if their header states none"
    command.add_argument("--license", metavar="ID", help=license)
    results, frozen = ("output of python -m eval, for the card", "output of python -m recipes.probe, for the card")
    command.add_argument("--results", metavar="CSV", type=Path, default=RESULTS, help=results)
    command.add_argument("--frozen", metavar="CSV", type=Path, default=FROZEN, help=frozen)

    command = add(
        "check", check, "check sha256, names and golden answers of folders, or of all hosted and bundled entries"
    )
    command.add_argument("folders", metavar="OUT", nargs="*", type=Path, help="folders that convert wrote")

    command = add("export", export, "write a backbone as ONNX or pt2, checked, or a model under the authors' names")
    command.add_argument("source", metavar="MODEL", help="entry, ORG/NAME, folder or file")
    command.add_argument("file", metavar="FILE", type=Path, help="file to write")
    command.add_argument("--format", choices=list(FORMATS), default="onnx", help="what to write (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives its exit code. A mistake of the user is reported in one line on stderr."""
    parser = create_parser()
    options = vars(parser.parse_args(argv))
    if not options:
        parser.print_help()
        return 0
    run = options.pop("run")

    def carry_out() -> int:
        for line in run(**options):
            show(line)
        return 0

    return guarded(carry_out)


if __name__ == "__main__":
    sys.exit(main())
