"""The models at the command line: list them, describe one, classify pictures with one.

python -m arm_zoo list
python -m arm_zoo info arm_base_patch16_224
python -m arm_zoo predict cat.jpg dog.png --model arm_base_patch16_224 --weights arm_base.pth
"""

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, resolve_input_data_config
from timm.models import get_arch_pretrained_cfgs, is_model_pretrained, list_models, split_model_name_tag

from arm_zoo.arm import ARM
from arm_zoo.files import CONFIG, WEIGHTS, read_config
from arm_zoo.hosted import TABLE, find_weights, training_commands
from arm_zoo.loading import from_pretrained
from arm_zoo.weights import CheckpointError, adapt_state_dict, read_checkpoint


def create(name: str, device: str = "meta") -> ARM:
    """The model untrained; on the meta device it has sizes but costs neither time nor memory.

    Raises:
        ValueError: for a name that is not of this package.
    """
    known = {*list_models(module="arm"), *list_models(module="arm", include_tags=True)}
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known))
        hint = f"did you mean {', '.join(close)}?" if close else "`python -m arm_zoo list` shows them all"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return cast(ARM, timm.create_model(name, device=device))


def count_parameters(model: ARM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def whereabouts(entry: str) -> str:
    """Whether the weights of an entry come with the package, are on the Hub, or neither."""
    if entry in TABLE and TABLE[entry].bundled:
        return "bundled"
    return "hosted" if is_model_pretrained(entry) else "not hosted"


def run_list(args: argparse.Namespace) -> int:
    """Print all entries with their tags, and then the short names."""
    names = list_models(module="arm")
    rows = [("name.tag", "input", "parameters", "weights")]
    for name in [tagged for entry in names for tagged in get_arch_pretrained_cfgs(entry)]:
        model = create(name)
        input_size = "x".join(map(str, model.pretrained_cfg["input_size"]))
        rows.append((name, input_size, f"{count_parameters(model) / 1e6:.1f} M", whereabouts(name)))
    width = max(len(name) for name, *_ in rows)
    for name, input_size, parameters, where in rows:
        print(f"{name:{width}}  {input_size:>9}  {parameters:>10}  {where}")
    print()
    for name in names:
        if not get_arch_pretrained_cfgs(name):
            print(f"{name} is short for {create(name).pretrained_cfg['architecture']}")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Print what is known about one entry, and how to load it."""
    model = create(args.name)
    cfg, embed = model.pretrained_cfg, model.patch_embed
    name = f"{cfg['architecture']}.{cfg['tag']}"
    tags = [split_model_name_tag(tagged)[1] for tagged in get_arch_pretrained_cfgs(name)]
    where = whereabouts(name)
    facts = {
        "tags": ", ".join([f"{tags[0]} (default)", *tags[1:]]),
        "parameters": f"{count_parameters(model):,} ({count_parameters(model) / 1e6:.1f} M)",
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "patches": f"{_by(embed.patch_size)}, stride {_by(embed.patch_stride)}, grid {_by(embed.grid_size)}",
        "classes": model.num_classes or "none (encoder without head)",
        "pooling": model.global_pool,
        "input_size": "x".join(map(str, cfg["input_size"])),
        **{key: cfg[key] for key in ("crop_mode", "crop_pct", "interpolation", "mean", "std", "license")},
        "paper": f"{cfg['paper_name']}, {cfg['paper_ids']}",
        "origin": cfg.get("origin_url", "this package"),
        "weights": "not hosted; load a .safetensors or .pth file of yours" if where == "not hosted" else where,
    }
    print(name)
    for key, value in facts.items():
        print(f"  {key:13}  {value}")
    source = ", pretrained_cfg_overlay=dict(file=PATH)" if where == "not hosted" else ""
    print(f'\nimport arm_zoo, timm\nmodel = timm.create_model("{name}", pretrained=True{source})')
    return 0


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def run_predict(args: argparse.Namespace) -> int:
    """Print the most probable classes of every picture; 1 if a picture could not be read."""
    model = load_classifier(args.model, args.weights).to(args.device).eval()
    transform = create_transform(**resolve_input_data_config(model))
    names = class_names(model)
    status = 0
    for path in args.images:
        try:
            image = read_image(path, model.in_chans)
        except Exception as error:  # from damaged pictures Pillow raises all sorts: OSError, SyntaxError, ...
            print(f"{path}: {_one_line(error)}", file=sys.stderr)
            status = 1
            continue
        with torch.inference_mode():
            probabilities = model(transform(image)[None].to(args.device))[0].float().softmax(dim=0)
        print(path)
        for probability, index in zip(*probabilities.topk(min(args.top, len(names))), strict=True):
            print(f"  {probability:6.1%}  {names[index]}")
    return status


def load_classifier(name: str, weights: Path | None) -> ARM:
    """The model with the package's or hosted weights, those of a file, or those of a folder.

    Classes and image channels are the file's.

    Raises:
        CheckpointError: if the weights are not hosted, cannot be read, are another model's or have no head.
        OSError: if there is no such file or folder.
        ValueError: for an unknown name, or a folder that is not of timm or of another model.
    """
    model = create(name)
    if weights is None:
        entry = f"{model.pretrained_cfg['architecture']}.{model.pretrained_cfg['tag']}"
        if find_weights(entry) is None:
            raise CheckpointError(_ways_on(entry))
        model = cast(ARM, timm.create_model(name, pretrained=True))
    elif weights.is_dir() or _is_of_timm(weights):
        folder = weights if weights.is_dir() else weights.parent
        config = read_config(folder)
        if "pretraining_model" in config:
            raise CheckpointError(
                f"{folder} holds a pretraining model, which has no classifier head; finetune it first"
            )
        architecture = config.get("architecture", "no timm model")
        if architecture != model.pretrained_cfg["architecture"]:
            raise ValueError(f"{folder / CONFIG} is of {architecture}, not of {name}")
        model = cast(ARM, from_pretrained(folder))
    else:
        state_dict = read_checkpoint(weights)
        sizes: dict[str, Any] = {"num_classes": 0}
        for size, key, dim in (("num_classes", "head.weight", 0), ("in_chans", "patch_embed.proj.weight", 1)):
            if key in state_dict:
                sizes[size] = state_dict[key].shape[dim]
        model = cast(ARM, timm.create_model(name, **sizes))
        model.load_state_dict(adapt_state_dict(state_dict, model, timm_adapts=False))
    if not model.num_classes:
        raise CheckpointError(f"{weights or name} has no classifier head; finetune it first")
    if model.in_chans not in (1, 3):
        raise ValueError(f"pictures have 1 or 3 channels, the model takes {model.in_chans}")
    return model


def _ways_on(entry: str) -> str:
    """What `arm_zoo.hosted.ways_on` says, in terms of this command line."""
    bundled = [name for name, weights in TABLE.items() if weights.bundled]
    return (
        f"the weights of {entry} are not hosted yet: name an official or own file (--weights FILE), train them from a "
        f"checkout ({training_commands(entry)}), or use a model that comes with the package "
        f"(--model {' or '.join(bundled)})"
    )


def _is_of_timm(file: Path) -> bool:
    """Whether the file is the one that timm's config.json beside it describes."""
    return file.name == WEIGHTS and (file.parent / CONFIG).is_file()


def class_names(model: ARM) -> list[str]:
    """Names of the classes: those saved with the weights, ImageNet's for 1000 classes, else numbers.

    ImageNet's classes are told in words where the saved name is WordNet's number, as n01443537.
    """
    imagenet = ImageNetInfo()
    saved = model.pretrained_cfg.get("label_names") or ()
    names = dict(saved.items() if isinstance(saved, Mapping) else enumerate(saved))
    if not names and model.num_classes == 1000:
        return cast(list[str], imagenet.label_descriptions())
    words = dict(zip(imagenet.label_names(), imagenet.label_descriptions(), strict=True))
    saved_names = [str(names.get(i, names.get(str(i), i))) for i in range(model.num_classes)]
    return [words.get(name, name) for name in saved_names]


def read_image(path: Path, channels: int) -> Image.Image:
    """A picture as the camera was held, in grey for one channel and colour for three, on white where transparent."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16 bits per pixel: Pillow's conversion would cut them off at 255
        image = image.point(lambda value: value / 256)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if channels == 1 else "RGB")


def _one_line(error: Exception) -> str:
    lines = (str(error) or type(error).__name__).splitlines()
    return "; ".join(line.strip() for line in lines).replace(":; ", ": ")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def usable_device(text: str) -> torch.device:
    """A device that this machine and this PyTorch have."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {str(error).splitlines()[0]}") from error


def create_parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m arm_zoo", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="all models with tags, input size, parameters, and who has weights")
    command.set_defaults(run=run_list)

    command = commands.add_parser("info", help="sizes, preprocessing, licence and paper of one model")
    command.add_argument("name", metavar="NAME", help="as `list` shows it; without a tag, the default one")
    command.set_defaults(run=run_info)

    command = commands.add_parser("predict", help="classify pictures")
    command.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="a picture that Pillow reads")
    command.add_argument("--model", metavar="NAME", required=True, help="an entry, as `list` shows it")
    command.add_argument(
        "--weights",
        metavar="FILE",
        type=Path,
        help="a .safetensors or .pth, of this project or the authors, or a folder with model.safetensors and "
        "config.json; without it, the weights that the package or the Hub has",
    )
    command.add_argument("--top", metavar="K", type=positive, default=5, help="classes to print (%(default)s)")
    command.add_argument("--device", type=usable_device, default="cpu", help="cpu, cuda, ... (%(default)s)")
    command.set_defaults(run=run_predict)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. What the user can mend is one line on stderr."""
    args = create_parser().parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
