"""Colours of packages and of what is around them."""

from collections.abc import Iterable

import numpy as np
from numpy.random import Generator

Color = tuple[int, int, int]
Panel = tuple[Color | None, Color]  # what something is printed on (None: the bare package), and the ink
BLACK, WHITE, CLEAR = (18, 18, 20), (250, 250, 248), (0, 0, 0, 0)


def as_color(values: Iterable[float]) -> Color:
    """Red, green and blue as Pillow takes them."""
    return tuple(int(value) for value in values)


def luminance(color: Color) -> float:
    """Brightness as seen, 0..255."""
    return 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]


def contrast(first: Color, second: Color) -> float:
    """How far two colours differ in brightness, 0..255."""
    return abs(luminance(first) - luminance(second))


def mix(first: Color, second: Color, share: float) -> Color:
    """`share` of the second colour in the first."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def ink_on(rng: Generator, paper: Color) -> Color:
    """A text colour that can be read on `paper`: mostly black or white, sometimes tinted."""
    base = BLACK if luminance(paper) > rng.uniform(90, 150) else WHITE
    return mix(base, as_color(rng.integers(0, 256, 3)), float(rng.choice([0, 0, 0.1, 0.3])))


def vivid(rng: Generator) -> Color:
    """A printing colour: any hue, saturated more often than not."""
    hue, saturation, value = rng.uniform(0, 6), rng.beta(3, 1.5), rng.beta(3, 1.6)
    wheel = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return as_color(255 * value * (1 - saturation + saturation * wheel))
