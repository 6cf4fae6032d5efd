"""The picture: where panels lie, and in which colours."""

import numpy as np
import torch

from arm_zoo.see.panels import Panel
from arm_zoo.see.sheet import draw


def test_panels_lie_side_by_side() -> None:
    """All as large as the image: 280 pixels wide where it is twice as wide as high, below 48 pixels of titles."""
    ramp = torch.tensor([[0.0, 0.5], [1.0, torch.nan]])
    panels = [Panel("image", "", torch.ones(1, 4, 8)), Panel("b", "", torch.eye(3)[:, :, None].expand(3, 3, 2))]
    panels += [Panel("numbers", "", ramp), Panel("d", "", torch.zeros(2, 2)), Panel("e", "", ramp, (0.5, 0, 1, 0.5))]
    sheet = draw(panels)
    assert sheet.size == (18 + 4 * 298, 18 + 2 * (140 + 48 + 18))

    def square(column: int, row: int, x: float, y: float) -> list[int]:
        """The colour in a panel's place (x, y), from 0 to 1."""
        return np.asarray(sheet)[int(18 + row * 206 + 48 + 140 * y), int(18 + column * 298 + 280 * x)].tolist()

    assert square(0, 0, 0.5, 0.5) == [255, 255, 255]
    assert [square(1, 0, 0.5, y) for y in (0.1, 0.5, 0.9)] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    numbers = [square(2, 0, x, y) for y in (0.2, 0.7) for x in (0.2, 0.7)]
    assert numbers == [[8, 6, 30], [190, 54, 82], [253, 250, 190], [225, 225, 225]]
    assert square(3, 0, 0.5, 0.5) == [8, 6, 30]
    assert square(0, 1, 0.5, 0.2) == square(0, 1, 0.7, 0.001) == [0, 213, 255]  # the mark's left and upper sides
    assert square(0, 1, 0.7, 0.2) == numbers[1]


def test_titles_are_drawn() -> None:
    values = torch.zeros(1, 5, 5)
    empty, titled = (np.asarray(draw([Panel(title, "", values)])) for title in ("", "image"))
    assert (empty[:66] == 255).all() and (titled[:66] < 255).any()
    assert (titled[66:] == empty[66:]).all()
