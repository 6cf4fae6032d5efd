"""Panels side by side in one picture, with their titles."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from arm_zoo.see.panels import Panel

_SIDE, _GAP, _TITLE = 280, 18, 48  # pixels: the longer side of a panel, the space around it, and that of its title
_COLUMNS = 4
_INK, _GREY, _ABSENT = "#1b1b1f", "#6b6b76", 225  # of titles, of notes, and the brightness of what has no value
_MARK = "#00d5ff"
# From 0 to 1, equally far apart, ever brighter: night, violet, red, amber and ivory.
_PALETTE = np.array([(8, 6, 30), (84, 22, 108), (190, 54, 82), (247, 146, 30), (253, 250, 190)])


def draw(panels: Sequence[Panel]) -> Image.Image:
    """The panels in rows of four, all as large as the first, whose values have the shape of the image."""
    height, width = (round(_SIDE * size / max(panels[0].values.shape[-2:])) for size in panels[0].values.shape[-2:])
    columns, cell = min(_COLUMNS, len(panels)), (max(width, _SIDE) + _GAP, height + _TITLE + _GAP)
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    title, note = ImageFont.load_default(17), ImageFont.load_default(12)
    for i, panel in enumerate(panels):
        left, top = _GAP + i % columns * cell[0], _GAP + i // columns * cell[1]
        pen.text((left, top), panel.title, _INK, title)
        pen.text((left, top + 23), panel.note, _GREY, note)
        top += _TITLE
        # pixels stay squares when they are enlarged
        sheet.paste(Image.fromarray(_colours(panel.values)).resize((width, height), Image.Resampling.BOX), (left, top))
        if panel.mark is not None:
            box = np.array((left, top) * 2) + np.array((width, height) * 2) * panel.mark
            pen.rectangle(box.tolist(), outline=_MARK, width=2)
    return sheet


def _colours(values: Tensor) -> NDArray[np.uint8]:
    """Values of a panel as colours (h, w, 3) of 8 bits: numbers by the palette, colours and grey as they are."""
    values = values.detach().float().cpu()
    if values.ndim == 2:
        place, ends = values.nan_to_num().numpy(), np.linspace(0, 1, len(_PALETTE))
        colours = torch.from_numpy(np.stack([np.interp(place, ends, channel) for channel in _PALETTE.T]))
        colours = colours.where(~values.isnan(), torch.nan)
    else:
        colours = 255 * values.expand(3, -1, -1)
    return colours.nan_to_num(_ABSENT).round().byte().movedim(0, -1).contiguous().numpy()
