"""The label of a package while it is printed: its artwork, what lies where, and where there is still room."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from helpers.tiny.colors import BLACK, WHITE, Color, contrast, mix, vivid
from helpers.tiny.marks import draw_food_picture
from helpers.tiny.printing import Size, Style, gradient, pick
from helpers.tiny.views import View, hidden_cells

CELL = 6  # pixels of the grid on which free places are looked for
READABLE = 70  # contrast of the ink with what it is printed on
Corner = tuple[int, int]  # x, y of the upper left corner
Rectangle = tuple[int, int, int, int]  # x1, y1, x2, y2


class Surface:
    """The label: its picture, a mask of the ids of its objects, and a grid of the cells that are taken.

    The first of `names` belongs to id 1; id 0 is the background. What the camera does not see is taken from the start.
    """

    def __init__(self, rng: Generator, view: View, style: Style) -> None:
        self.rng, self.style = rng, style
        self.image = draw_artwork(rng, view.label_size, style)
        self.ids = Image.new("L", view.label_size, 0)
        self.names: list[str] = []
        self.taken = hidden_cells(view, CELL)

    def free_corner(self, size: Size) -> Corner | None:
        """Upper left corner of a free rectangle of `size`, or None."""
        across, down = -(-size[0] // CELL) + 1, -(-size[1] // CELL) + 1
        if across >= self.taken.shape[1] or down >= self.taken.shape[0]:
            return None
        sums = np.pad(self.taken.cumsum(0, dtype=np.int32).cumsum(1), ((1, 0), (1, 0)))
        inside = sums[down:, across:] - sums[:-down, across:] - sums[down:, :-across] + sums[:-down, :-across]
        rows, columns = np.nonzero(inside == 0)
        if len(rows) == 0:
            return None
        # printers align: most often take the topmost, leftmost, lowest or rightmost place instead of any
        best = int(np.argmin(pick(self.rng, (self.rng.random(len(rows)), rows, columns, -columns, rows, -rows))))
        return int(columns[best]) * CELL + CELL // 2, int(rows[best]) * CELL + CELL // 2

    def is_free(self, rectangle: Rectangle) -> bool:
        """Whether a rectangle lies on the label, is seen, and touches nothing."""
        x1, y1, x2, y2 = (v // CELL for v in rectangle)
        inside = x1 >= 0 and y1 >= 0 and y2 < self.taken.shape[0] and x2 < self.taken.shape[1]
        # the outer cells may be shared with the neighbour that the text is set close to
        return inside and not self.taken[y1 + 1 : y2, x1 + 1 : x2].any()

    def place(self, patch: Image.Image, corner: Corner, name: str | None = None) -> None:
        """Print a patch, and take its cells; with a name it becomes an object of the mask."""
        rectangle = (*corner, corner[0] + patch.width, corner[1] + patch.height)
        if name:
            below = self.image.crop(rectangle).resize((1, 1), Image.BOX).getpixel((0, 0))
            if contrast(below, self.style.ink) < READABLE:
                self.image.paste(self.style.paper, rectangle)
            self.names.append(name)
            self.ids.paste(len(self.names), rectangle)
        self.image.paste(patch, corner, patch)
        x1, y1, x2, y2 = (max(v // CELL, 0) for v in rectangle)
        self.taken[y1 : y2 + 1, x1 : x2 + 1] = True


def draw_artwork(rng: Generator, size: Size, style: Style) -> Image.Image:
    """The empty label: paper, perhaps a gradient, blocks of colour, swooshes, a pattern, pictures of food."""
    shade = mix(style.paper, pick(rng, (BLACK, WHITE, style.paper)), 0.25)
    image = gradient(style.paper, shade, size, rng.random() < 0.6)
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:
        for _ in range(int(rng.integers(1, 4))):
            color = pick(rng, (style.accent, vivid(rng), mix(style.paper, style.accent, 0.3)))
            colored_shape(rng, draw, size, color)
    if rng.random() < 0.2:
        pattern(rng, draw, size, mix(style.paper, style.accent, rng.uniform(0.1, 0.4)))
    for _ in range(int(rng.choice([0, 1, 2], p=[0.6, 0.25, 0.15]))):
        part = tuple(int(side * rng.uniform(0.2, 0.6)) for side in size)
        food = draw_food_picture(rng, part, style)
        image.paste(food, tuple(int(rng.uniform(-0.2, 0.9) * side) for side in size), food)
    return image


def colored_shape(rng: Generator, draw: ImageDraw.ImageDraw, size: Size, color: Color) -> None:
    """A block along an edge, a large ellipse that runs out of the label, or a slanted band."""
    width, height = size
    kind, cut = int(rng.integers(4)), rng.uniform(0.08, 0.5)
    if kind == 0:
        y1, y2 = (0, height * cut) if rng.random() < 0.5 else (height * (1 - cut), height)
        draw.rectangle((0, y1, width, y2), fill=color)
    elif kind == 1:
        x1, x2 = (0, width * cut) if rng.random() < 0.5 else (width * (1 - cut), width)
        draw.rectangle((x1, 0, x2, height), fill=color)
    elif kind == 2:
        x, y, reach = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.2, 0.8) * width
        draw.ellipse((x - reach, y - reach * 0.6, x + reach, y + reach * 0.6), fill=color)
    else:
        y, slope, thick = rng.uniform(0, height), rng.uniform(-0.4, 0.4) * height, rng.uniform(0.05, 0.2) * height
        draw.polygon([(0, y), (width, y + slope), (width, y + slope + thick), (0, y + thick)], fill=color)


def pattern(rng: Generator, draw: ImageDraw.ImageDraw, size: Size, color: Color) -> None:
    """Stripes or dots over the whole label."""
    step = int(rng.integers(8, 40))
    if rng.random() < 0.5:
        slant = int(rng.integers(-60, 60))
        for x in range(-60, size[0] + 60, step):
            draw.line((x, 0, x + slant, size[1]), fill=color, width=max(step // 3, 1))
    else:
        for y in range(0, size[1], step):
            for x in range((y // step % 2) * step // 2, size[0], step):
                draw.ellipse((x, y, x + step * 0.3, y + step * 0.3), fill=color)
