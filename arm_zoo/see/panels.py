"""Computes the panels that show what a model sees in an image: values for every patch or pixel."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from arm_zoo.layers.ss2d import DIRECTIONS
from arm_zoo.ops import scan_backend
from arm_zoo.pretraining.autoregressive import DVAE_TOKENS, ARMPretrain
from arm_zoo.pretraining.targets import NORMED_PIXEL
from arm_zoo.see.scans import ScanRecorder, attention_row, contributions

_DECADES = 3  # that logarithmic panels show below their largest value


class Panel(NamedTuple):
    """A title, a note on what is shown, and values in 0..1, NaN for none: colours (C, h, w) or numbers (h, w)."""

    title: str
    note: str
    values: Tensor
    mark: tuple[float, float, float, float] | None = None  # a box: left, top, right and bottom in 0..1


@scan_backend("torch")  # it compiles nothing and runs on any device
def panels(
    model: Any,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    patch: tuple[int, int] | None = None,
    layer: int = -1,
) -> tuple[list[Panel], list[str]]:
    """The panels that apply to a model, and for each other one the reason why not.

    Args:
        model: one of ours or of timm with `forward_intermediates`, or a pretraining model, in evaluation mode.
        images: (1, C, H, W), one image as the model takes it.
        mean, std: by which its channels were normalised.
        patch: row and column in the map of features, from 0; None for the centre, rounded towards the top and left.
        layer: the index of a block, or of a stage if stages have maps of their own; negative ones count from the end.

    Raises:
        ValueError: if there is no such patch or layer, or the model gives no features of patches.
    """
    images = images.detach().requires_grad_()
    with ScanRecorder() as recorder:
        features = patch_features(model, images, layer)
    rows, columns = features.shape[1:]
    row, column = patch or ((rows - 1) // 2, (columns - 1) // 2)
    if not (0 <= row < rows and 0 <= column < columns):
        allowed = f"rows 0 to {rows - 1} and columns 0 to {columns - 1}"
        raise ValueError(f"no patch in row {row} and column {column}: the map of features has {allowed}")
    if features[0, row, column].isnan():
        raise ValueError(f"the encoder never sees the last cluster, where patch {row} {column} lies; name another")
    field = receptive_field(images, features[:, row, column])
    mark = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
    image = _denormalised(images, mean, std)
    shown, missing = [Panel("image", f"as the model gets it, {_by(image)}", image, mark)], []
    if isinstance(model, ARMPretrain) and model.target != DVAE_TOKENS:
        shown.append(_predicted_clusters(model, images, mean, std))
    else:
        missing.append("predicted clusters: this is no pretraining model of pixels")
    note = f"first three principal components, {_by(features)}"
    shown.append(Panel("features", note, principal_colours(features)))
    note = f"gradient of the patch's norm; log, {_DECADES} decades"
    shown.append(Panel("effective receptive field", note, _logarithmic(field), mark))
    if recorder.last is None:
        return shown, [*missing, f"attention and directions of the scan: {type(model).__name__} has none"]
    patches = patches_of_tokens(model, rows * columns, recorder.last.shape[2])
    with torch.no_grad():
        row_of_patch = attention_row(recorder.last, int((patches == row * columns + column).nonzero()))
        parts = _map_of(contributions(recorder.last), patches, rows, columns)
    note = f"from the patch to all by decays; log, {_DECADES} decades"
    attention = _logarithmic(_map_of(row_of_patch, patches, rows, columns))
    shown.append(Panel("attention of the scan", note, attention, mark))
    if len(parts) == 1:
        return shown, [*missing, "contributions of directions: the scan has only one"]
    return [*shown, *_direction_panels(getattr(model, "directions", DIRECTIONS), parts)], missing


def _predicted_clusters(model: ARMPretrain, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Panel:
    """The model's prediction of every cluster but the first, which is marked."""
    (down, across), (rows, columns) = model.cluster_grid, model.patch_embed.grid_size
    top, left = divmod(int(model.shown(images)), columns // across)
    given = (left * across / columns, top * down / rows, (left + 1) * across / columns, (top + 1) * down / rows)
    note = "each from those before it; the marked one is given"
    if model.target == NORMED_PIXEL:
        note = "by the true mean and deviation of each patch"
    return Panel("predicted clusters", note, _denormalised(model.reconstruct(images), mean, std), given)


def _direction_panels(names: Sequence[str], parts: Tensor) -> Iterator[Panel]:
    """A panel for each direction, of its contributions (directions, rows, columns) as shares."""
    for name, part in zip(names, parts, strict=True):
        note = f"{part.nansum() / parts.nansum():.0%} of the output; dark 0, light all"
        yield Panel(f"scan: {name.replace('_', ' ')}", note, (part / parts.sum(0)).clamp(0, 1))


def patch_features(model: Any, images: Tensor, layer: int) -> Tensor:
    """Features (C, rows, columns) of a layer, or of ARMPretrain those for its decoder, NaN in the last cluster."""
    if isinstance(model, ARMPretrain):
        if layer != -1:
            raise ValueError(f"a pretraining model shows what its decoder gets, not a layer; got the layer {layer}")
        latents = model.forward_encoder(images)[0].flatten(1)
        return _map_of(latents.T, model.order[: len(latents)], *model.patch_embed.grid_size)
    if not hasattr(model, "forward_intermediates"):
        problem = f"{type(model).__name__} gives no features of patches: it has no forward_intermediates"
        raise ValueError(
            f"{problem}; allowed: models of timm that have it, as the backbone/ beside a pretraining_model/"
        )
    layers = len(model.feature_info)
    if not -layers <= layer < layers:
        raise ValueError(f"no layer {layer}: the model has the layers 0 to {layers - 1}, or -{layers} to -1")
    return model.forward_intermediates(images, indices=[layer], stop_early=True, intermediates_only=True)[0][0]


def patches_of_tokens(model: Any, patches: int, tokens: int) -> Tensor:
    """The index, row by row, of the patch that each token of a scan stands for; -1 for the class token."""
    if isinstance(model, ARMPretrain):
        return model.order[:tokens].cpu()
    numbers = torch.arange(patches)
    if tokens == patches:
        return numbers
    return torch.cat([numbers[: patches // 2], torch.tensor([-1]), numbers[patches // 2 :]])


def principal_colours(features: Tensor) -> Tensor:
    """The first three principal components of features (C, rows, columns) as colours (3, rows, columns).

    Of each the percentiles 2 and 98 over the patches become 0 and 1. Its largest weight is positive, so that the
    colours are the same wherever they are computed.
    """
    vectors = features.detach().flatten(1).T.double().cpu()
    seen = ~vectors.isnan().any(1)
    centred = vectors[seen] - vectors[seen].mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    values = F.pad(centred @ axes.T, (0, 3 - len(axes)))  # fewer than three patches have fewer components
    low, high = values.quantile(torch.tensor([0.02, 0.98], dtype=values.dtype), dim=0)
    colours = vectors.new_full((len(vectors), 3), torch.nan)
    colours[seen] = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours.T.unflatten(1, features.shape[1:])


def receptive_field(images: Tensor, vector: Tensor) -> Tensor:
    """How much each pixel (H, W) of the image influences the features of a patch, `vector`.

    That is the absolute gradient of the features' Euclidean norm by the pixels, summed over the image's channels.
    """
    [gradient] = torch.autograd.grad(vector.norm(), images)
    return gradient[0].abs().sum(0)


def _map_of(values: Tensor, patches: Tensor, rows: int, columns: int) -> Tensor:
    """Values (..., tokens) at the places of their patches (..., rows, columns), NaN for patches without a token."""
    placed = values.new_full((*values.shape[:-1], rows * columns), torch.nan)
    placed[..., patches[patches >= 0]] = values[..., patches >= 0]
    return placed.unflatten(-1, (rows, columns))


def _logarithmic(values: Tensor) -> Tensor:
    """Values from 0 on at a logarithmic scale: 1 for the largest, 0 for those smaller by `_DECADES` decades."""
    return ((values / values.nan_to_num().max()).log10() / _DECADES + 1).clamp(0, 1)


def _denormalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Colours (C, H, W) in 0..1 of the first image."""
    middle, scale = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images[0].detach() * scale + middle).clamp(0, 1)


def _by(values: Tensor) -> str:
    return "x".join(map(str, values.shape[-2:]))
