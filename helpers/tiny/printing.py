"""What all printing on a package shares: fonts, the style of one package, and the sheet to draw on.

`texts.py`, `tables.py` and `marks.py` draw with it. Their `draw_*` functions take a numpy Generator, the wanted size
in pixels (width, height) and a `Style`, and return an RGBA patch; transparent pixels show the package. A patch may
come out at another size than asked for (text has a natural width): `fit` resizes it, which condenses or widens the
letters as printers do.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import matplotlib
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from helpers.tiny.colors import CLEAR, Color

Size = tuple[int, int]  # width, height
Point = tuple[float, float]  # x, y
Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Item = TypeVar("Item")

FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SANS, SANS_BOLD = "DejaVuSans", "DejaVuSans-Bold"
BOLD = {
    SANS: SANS_BOLD,
    "DejaVuSerif": "DejaVuSerif-Bold",
    "DejaVuSansMono": "DejaVuSansMono-Bold",
    "DejaVuSans-Oblique": "DejaVuSans-BoldOblique",
}
LINE_STEP = 1.18  # from line to line, in sizes of the letters


def pick(rng: Generator, items: Sequence[Item]) -> Item:
    """One item of a sequence, without numpy's conversion of its type."""
    return items[int(rng.integers(len(items)))]


@lru_cache(maxsize=512)
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """One font of matplotlib's bundle; `size` in pixels."""
    return ImageFont.truetype(FONT_FOLDER / f"{face}.ttf", max(size, 4), layout_engine=ImageFont.Layout.BASIC)


def natural_width(text: str, face: str) -> float:
    """Width of a text in sizes of its letters."""
    return font(face, 20).getlength(text) / 20


@dataclass(frozen=True)
class Style:
    """How one package is printed."""

    paper: Color  # what the text is printed on
    ink: Color  # text
    accent: Color  # brand colour
    face: str  # font file without its ending
    language: str  # key of WORDS["languages"]

    @property
    def bold(self) -> str:
        """The bold face that belongs to `face`."""
        return BOLD[self.face]


class Sheet:
    """A patch while it is printed: a picture of the colour `panel` or transparent, its pen, and the ink for texts."""

    def __init__(self, size: Point, style: Style, panel: Color | None = None, ink: Color | None = None) -> None:
        self.width, self.height = max(int(size[0]), 2), max(int(size[1]), 2)
        self.image = Image.new("RGBA", (self.width, self.height), panel or CLEAR)
        self.draw = ImageDraw.Draw(self.image)
        self.style, self.panel, self.ink = style, panel, ink or style.ink

    def with_ink(self, ink: Color) -> "Sheet":
        """The same sheet, written on with another ink."""
        other = copy(self)
        other.ink = ink
        return other

    def inside(self, pad: float) -> Box:
        """The sheet less a margin."""
        return pad, pad, self.width - pad, self.height - pad

    def font(self, size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
        """The font of the style, `size` in pixels."""
        return font(self.style.bold if bold else self.style.face, int(size))

    def frame(self, line: float) -> None:
        """A line of the ink along the edge."""
        self.draw.rectangle((0, 0, self.width - 1, self.height - 1), outline=self.ink, width=max(int(line), 1))

    def center_text(self, box: Box, text: str, face: str = SANS_BOLD, largest: float = 10**6) -> None:
        """One line as large as the box allows, in its middle."""
        x1, y1, x2, y2 = box
        size = int(min((y2 - y1) * 0.85, (x2 - x1) / max(natural_width(text, face), 0.1), largest))
        self.draw.text(((x1 + x2) / 2, (y1 + y2) / 2), text, self.ink, font(face, size), "mm")

    def write_lines(self, box: Box, runs: list[tuple[str, bool]], size: int) -> None:
        """Fill a box with the words of `runs` [(text, bold)], line by line, as far as there is room."""
        left, y, right, bottom = box
        x = left
        for text, bold in runs:
            used = self.font(size, bold)
            for word in text.split():
                length = used.getlength(word)
                if x + length > right and x > left:
                    x, y = left, y + size * LINE_STEP
                if y + size > bottom + 1:
                    return
                self.draw.text((x, y), word, self.ink, used)
                x += length + size * 0.3


def round_corners(image: Image.Image, radius: float) -> Image.Image:
    """Cut the corners (changed in place)."""
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, image.width - 1, image.height - 1), radius, fill=255)
    image.putalpha(mask)
    return image


def fit(patch: Image.Image, size: Size, max_anisotropy: float = 1.3) -> Image.Image:
    """The patch without its transparent margin, inside `size`; stretched by `max_anisotropy` at most."""
    patch = patch.crop(patch.getbbox())
    across, down = size[0] / patch.width, size[1] / patch.height
    across, down = min(across, down * max_anisotropy), min(down, across * max_anisotropy)
    return patch.resize((max(round(patch.width * across), 2), max(round(patch.height * down), 2)), Image.BILINEAR)


def gradient(first: Color, second: Color, size: Size, vertical: bool) -> Image.Image:
    """A linear run from one colour to another."""
    ramp = np.linspace(first, second, size[1] if vertical else size[0], dtype=np.float32).astype(np.uint8)
    ramp = ramp[:, None] if vertical else ramp[None]
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(ramp, (size[1], size[0], 3))))


def as_picture(pixels: np.ndarray) -> Image.Image:
    """A picture of float pixels [height, width, 3]; what lies beyond 0..255 is cut."""
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
