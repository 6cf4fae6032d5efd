"""The models at the command line: list and describe them, classify images, show what a model sees, run other programs.

python -m arm_zoo list
python -m arm_zoo info arm_base_patch16_224
python -m arm_zoo predict cat.jpg dog.png --model arm_tiny_patch4_32
python -m arm_zoo predict FOLDER_OF_IMAGES --model FOLDER_OF_A_MODEL
python -m arm_zoo see cat.jpg --model arm_tiny_patch8_64
python -m arm_zoo run validate.py --model arm_tiny_patch8_64 ...
"""

import argparse
import contextlib
import functools
import importlib
import io
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from PIL import Image
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageNetInfo,
    create_transform,
    resolve_data_config,
    resolve_input_data_config,
)
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag
from torch.utils.flop_counter import FlopCounterMode

from arm_zoo.command_line import guarded, one_line, positive, usable_device
from arm_zoo.files import CheckpointError, replacing_files
from arm_zoo.heads.models import Segmenter
from arm_zoo.images.decode import UndecodableImage, decode_image
from arm_zoo.images.listing import IMAGE_ENDINGS, contents, left_out
from arm_zoo.loading import Loaded, entries, label_names, load, unknown_model
from arm_zoo.models._builder import ARCHITECTURES, SHORT_NAMES
from arm_zoo.pretraining._registry import OBJECTIVES, PretrainingModel
from arm_zoo.see.panels import panels
from arm_zoo.see.sheet import draw
from arm_zoo.weights.find import whereabouts
from arm_zoo.weights.hosted import TABLE, Weights

# Python's own packages that find and start a program.
_SEARCH = ("runpy", "importlib", "_frozen_importlib", "_frozen_importlib_external", "pkgutil", "zipimport")

_LEGEND = """\
name.tag    the model and, after the dot, its weights; without a tag the first one listed is meant
input       channels x height x width of its images
parameters  in millions, with the classifier where the weights have one
weights     of pretrained=True: bundled with the package; hosted by us or upstream at their authors', and fetched once;
            not hosted: train them, or load a file of yours"""


def create(name: str) -> Any:
    """An entry's model on the meta device, where it has sizes but takes neither time nor memory."""
    if name not in entries():
        raise unknown_model(name, entries())
    return timm.create_model(name, device="meta")


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run_list(args: argparse.Namespace) -> int:
    """Print all entries with their tags, what the columns mean, short names, and what each objective pretrains."""
    names = [tagged for architecture in ARCHITECTURES for tagged in get_arch_pretrained_cfgs(architecture)]
    width = max(map(len, names))
    print(f"{'name.tag':{width}}  {'input':>9}  {'parameters':>10}  weights")
    for name in names:
        model = create(name)
        parameters = f"{count_parameters(model) / 1e6:.1f} M"
        print(f"{name:{width}}  {_by(*model.pretrained_cfg['input_size']):>9}  {parameters:>10}  {whereabouts(name)}")
    print(f"\n{_LEGEND}\n")
    for short, name in SHORT_NAMES.items():
        print(f"{short} is short for {name}")
    print()
    for objective, row in OBJECTIVES.items():
        print(f"{objective} pretrains {', '.join(row.sizes)}")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Print what is known about one entry, and how to load it."""
    model = create(args.name)
    cfg = model.pretrained_cfg
    name = f"{cfg['architecture']}.{cfg['tag']}"
    tags = [split_model_name_tag(tagged)[1] for tagged in get_arch_pretrained_cfgs(name)]
    where = whereabouts(name)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:  # on the meta device
        model.eval()(torch.empty(1, *cfg["input_size"], device="meta"))
    notes = {
        "not hosted": "not hosted; load a .safetensors or .pth file of yours",
        "upstream": f"upstream: fetched once from its authors' {TABLE.get(name, Weights()).repository}",
    }
    paper = [cfg[key] for key in ("paper_name", "paper_ids") if key in cfg]
    facts = {
        "tags": ", ".join([f"{tags[0]} (default)", *tags[1:]]),
        "parameters": f"{count_parameters(model):,} ({count_parameters(model) / 1e6:.1f} M)",
        "multiply-adds": f"{counter.get_total_flops() // 2 / 1e6:,.1f} M per image (matrix products and convolutions; "
        "FLOP counters do not count the recurrence itself)",
        **model.geometry(),
        "classes": model.num_classes or "none (encoder without head)",
        "pooling": model.global_pool,
        "input_size": _by(*cfg["input_size"]),
        **{key: cfg[key] for key in ("crop_mode", "crop_pct", "interpolation", "mean", "std")},
        "license": cfg.get("license", "unknown"),
        **({"paper": ", ".join(paper)} if paper else {}),
        "origin": cfg.get("origin_url", "this package"),
        "weights": notes.get(where, where),
    }
    print(name)
    for key, value in facts.items():
        print(f"  {key:13}  {value}")
    source = ", pretrained_cfg_overlay=dict(file=PATH)" if where == "not hosted" else ""
    print(f'\nimport arm_zoo, timm\nmodel = timm.create_model("{name}", pretrained=True{source})')
    return 0


def _by(*sizes: int) -> str:
    """Sizes as in 3x224x224."""
    return "x".join(map(str, sizes))


def run_predict(args: argparse.Namespace) -> int:
    """Print the most probable classes of every image; 1 if an image could not be read."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and classes may have what the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    loaded = load_model(args.model, args.weights)
    model = as_classifier(loaded.model, args.weights or args.model).to(args.device).eval()
    data_config = preprocessing(loaded)
    transform = create_transform(**data_config)
    names = class_names(model)
    status = 0
    paths, others = images_at(args.images)
    if others:
        print(left_out(others), file=sys.stderr)
    for path in paths:
        try:
            if os.path.isdir(path):  # only those without images are left
                endings = ", ".join(IMAGE_ENDINGS)
                raise FileNotFoundError(f"{path}: no images in this folder; their names end in {endings}")
            image = open_image(path, data_config)
        except (FileNotFoundError, UndecodableImage) as error:
            print(one_line(error), file=sys.stderr)
            status = 1
            continue
        with torch.inference_mode():
            probabilities = model(transform(image)[None].to(args.device))[0].float().softmax(dim=0)
        print(path)
        for probability, index in zip(*probabilities.topk(min(args.top, len(names))), strict=True):
            print(f"  {probability:6.1%}  {names[index]}")
    return status


def images_at(places: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths of images, where a folder stands for all in and below it, if there are any; and of other files there."""
    paths: list[str] = []
    others: list[str] = []
    for place in places:
        images, beside = contents(place) if os.path.isdir(place) else ([], [])
        paths += images or [place]
        others += beside
    return paths, others


def run_see(args: argparse.Namespace) -> int:
    """Draw what a model sees in an image as a PNG, and print which panels were left out, and why."""
    if args.output.exists() and os.path.exists(args.image) and args.output.samefile(args.image):
        raise ValueError(f"{args.output} is the image itself, which would be lost; name another file with --output")
    loaded = load_model(args.model, args.weights)
    model, data_config = loaded.model.to(args.device).eval(), preprocessing(loaded)
    if args.img_size is not None:
        data_config["input_size"] = (data_config["input_size"][0], args.img_size, args.img_size)
        if hasattr(model, "set_input_size"):  # models without it take any size, or refuse it below
            model.set_input_size(img_size=args.img_size)
    image = create_transform(**data_config)(open_image(args.image, data_config))[None].to(args.device)
    try:
        shown, missing = panels(model, image, data_config["mean"], data_config["std"], args.patch, args.layer)
    except AssertionError as error:  # by which timm's models refuse a size
        raise ValueError(f"the model takes no image of {_by(*image.shape[2:])} pixels: {error}") from error
    with replacing_files(args.output.parent) as beside:
        draw(shown).save(beside / args.output.name, "PNG")
    print(f"{args.output}: {', '.join(panel.title for panel in shown)}")
    for reason in missing:
        print(f"left out: {reason}")
    return 0


def load_model(source: str | None, weights: Path | None) -> Loaded:
    """The model that --model and --weights name, as `arm_zoo.loading.load` gives it."""
    where = weights or source
    if where is None:
        raise ValueError("no model: name an entry or a folder with --model, or weights with --weights")
    return load(source or where, weights if source else None)


def as_classifier(model: Any, where: str | Path) -> Any:
    """The model itself; CheckpointError, which names where it came from, if it cannot classify images."""
    if isinstance(model, Segmenter):
        raise CheckpointError(f"{where} classifies pixels, not images; `python -m eval.segmentation` scores it")
    if isinstance(model, PretrainingModel):
        raise CheckpointError(f"{where} holds a pretraining model, which has no classifier head; finetune it first")
    if not model.num_classes:
        raise CheckpointError(f"{where} has no classifier head; finetune it first")
    return model


def preprocessing(loaded: Loaded) -> dict[str, Any]:
    """How a model's images are prepared, in timm's terms.

    A pretraining model has the statistics that were saved beside it, or else ImageNet's.
    """
    model = loaded.model
    if isinstance(model, PretrainingModel):
        size = model.input_size()
        usual = {"mean": IMAGENET_DEFAULT_MEAN[: size[0]], "std": IMAGENET_DEFAULT_STD[: size[0]], "crop_pct": 1.0}
        saved = loaded.config.get("pretrained_cfg") or {}
        config = resolve_data_config(pretrained_cfg={**usual, **saved, "input_size": size})
    else:
        config = resolve_input_data_config(model)
    if (channels := config["input_size"][0]) not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, the model takes {channels}; choose another model")
    return config


def open_image(path: str, data_config: dict[str, Any]) -> Image.Image:
    """The image in a file, in grey for models that take one channel."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file or folder")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; name one of the images in it")
    return decode_image(path, path, "L" if data_config["input_size"][0] == 1 else "RGB")


def class_names(model: Any) -> list[str]:
    """Names of the classes: those saved with the weights, ImageNet's for 1000 classes, or else numbers, with a note.

    Saved names that are WordNet's numbers of ImageNet's classes, such as n01443537, become words.
    """
    imagenet, classes = ImageNetInfo(), model.num_classes
    saved = model.pretrained_cfg.get("label_names") or ()
    if names := label_names(model.pretrained_cfg, classes):
        words = dict(zip(imagenet.label_names(), imagenet.label_descriptions(), strict=True))
        return [words.get(name, name) for name in names]
    if not saved and classes == 1000:
        return cast(list[str], imagenet.label_descriptions())
    others = f"come with names of {len(saved)} classes, not of {classes}"
    reason = f"the weights {others if len(saved) not in (0, classes) else 'do not name their classes'}"
    advice = "label_names in a folder's config.json names them"
    print(f"{reason}: classes are shown by number, from 0; {advice}", file=sys.stderr)
    return list(map(str, range(classes)))


def run_script(args: argparse.Namespace) -> int:
    """Run a program that makes timm models, as `python SCRIPT` or `python -m MODULE` would, with ours registered.

    Its exceptions and its exit code are passed on. It can export the models to ONNX if the packages are installed.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("arm_zoo.onnx")
    try:
        if not args.module and (not args.script or not os.path.exists(args.script[0])):
            raise FileNotFoundError(f"no script {' '.join(args.script[:1])!r}")
        if args.module:
            module, *sys.argv[1:] = args.module
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv = args.script
            if not sys.flags.safe_path:
                sys.path[0] = os.path.dirname(os.path.realpath(args.script[0]))
            runpy.run_path(args.script[0], run_name="__main__")
    except (ImportError, OSError) as error:
        if _is_of_program(error):
            raise
        print(f"error: {one_line(error)}; expected SCRIPT or -m MODULE", file=sys.stderr)
        return 1
    return 0


def _is_of_program(error: Exception) -> bool:
    """Whether an error came from the program itself, not from Python's search for it."""
    _, *frames = traceback.walk_tb(error.__traceback__)
    modules = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return any(module.partition(".")[0] not in _SEARCH for module in modules)


def add_model_options(command: argparse.ArgumentParser) -> None:
    """The options that `load_model` takes, and the device."""
    command.add_argument(
        "--model",
        help="an entry, as `list` shows it; or a model of your own: a folder with config.json, a .safetensors or .pth "
        "file, hf-hub:ORG/NAME or local-dir:FOLDER",
    )
    command.add_argument(
        "--weights",
        metavar="FILE",
        type=Path,
        help="a .safetensors or .pth, of this project or the authors, or a folder, in place of the weights that the "
        "package or the Hub has for the entry; alone, the same as --model FILE",
    )
    command.add_argument("--device", type=usable_device, default="cpu", help="cpu, cuda, ... (%(default)s)")


def png_to_write(text: str) -> Path:
    """A file's name, as an option."""
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file to write to whose name ends in .png, got {text!r}")
    return path


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m arm_zoo",
        description=__doc__,
        epilog="`python -m arm_zoo COMMAND --help` tells the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND")

    command = commands.add_parser("list", help="all models: tags, input size, parameters, and where their weights are")
    command.set_defaults(run=run_list)

    command = commands.add_parser("info", help="sizes, preprocessing, licence and paper of one model")
    command.set_defaults(run=run_info)
    command.add_argument("name", metavar="NAME", help="as `list` shows it; without a tag, the default one")

    command = commands.add_parser("predict", help="classify images")
    command.set_defaults(run=run_predict)
    command.add_argument(
        "images", metavar="IMAGE", nargs="+", help="an image that Pillow reads, or a folder for all in and below it"
    )
    add_model_options(command)
    command.add_argument("--top", metavar="K", type=positive, default=5, help="classes to print (%(default)s)")

    command = commands.add_parser("see", help="draw what a model sees in an image, and how its scans work")
    command.set_defaults(run=run_see)
    command.add_argument("image", metavar="IMAGE", help="an image that Pillow reads")
    add_model_options(command)
    command.add_argument(
        "--patch",
        metavar=("ROW", "COLUMN"),
        nargs=2,
        type=int,
        help="the patch whose receptive field and attention are drawn, in the map of features, from 0 (the centre)",
    )
    command.add_argument(
        "--layer",
        metavar="N",
        type=int,
        default=-1,
        help="the block, or of models with maps of several sizes the stage: 0 is the first, -1 the last (%(default)s)",
    )
    command.add_argument(
        "--img-size", metavar="PIXELS", type=positive, help="the side of the square that the model gets (its own)"
    )
    command.add_argument(
        "--output", metavar="FILE", type=png_to_write, default="see.png", help="PNG to write (%(default)s)"
    )

    command = commands.add_parser(
        "run",
        help="run a program that makes timm models, such as timm's validate.py, so that it knows these models too",
        usage="%(prog)s SCRIPT [ARGUMENT ...] | -m MODULE [ARGUMENT ...]",
    )
    command.set_defaults(run=run_script)
    command.add_argument("script", nargs=argparse.REMAINDER, help="a Python file and its arguments")
    command.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module by name and its arguments")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. Mistakes of the user are reported in one line on stderr."""
    parser = create_parser()
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return 0
    if args.run is run_script:
        return run_script(args)
    return guarded(functools.partial(args.run, args))


if __name__ == "__main__":
    sys.exit(main())
