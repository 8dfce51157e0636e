"""What is behind a package: a shelf, a table, tiles, a wall, a floor or clutter."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from helpers.tiny.colors import BLACK, WHITE, mix, vivid
from helpers.tiny.printing import Box, Size, as_picture, gradient, pick

BOARDS = ((220, 220, 220), (160, 160, 165), (190, 40, 30))
PRICE_TAGS = (WHITE, (250, 230, 80))
WOODS = ((150, 105, 65), (205, 170, 120), (90, 60, 40), (225, 205, 175), (170, 140, 110))


def draw_background(rng: Generator, size: Size) -> Image.Image:
    """One of the backgrounds, out of focus more often than not."""
    half = (size[0] // 2, size[1] // 2)
    image = pick(rng, (shelf, wood, tiles, wall, floor, clutter, wood, wall))(rng, half)
    blur = rng.uniform(0, 4) if rng.random() < 0.8 else 0
    return image.filter(ImageFilter.GaussianBlur(blur)).resize(size, Image.BILINEAR)


def smooth_noise(rng: Generator, size: Size, cells: Size) -> np.ndarray:
    """Smooth noise in -1..1, float32 [height, width], with about `cells` (across, down) bumps."""
    coarse = rng.uniform(-1, 1, (cells[1] + 1, cells[0] + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.BICUBIC))


def shelf(rng: Generator, size: Size) -> Image.Image:
    """Rows of neighbouring packages above boards with price tags."""
    width, height = size
    image = Image.new("RGB", size, mix((40, 40, 40), (120, 110, 100), rng.random()))
    draw, rows = ImageDraw.Draw(image), int(rng.integers(1, 4))
    for row in range(rows):
        base, tall, x = (row + 1) * height / rows, height / rows, -10.0
        while x < width:
            wide, high = rng.uniform(0.12, 0.35) * width, tall * rng.uniform(0.55, 0.92)
            other_package(rng, draw, (x, base - high, x + wide, base))
            x += wide + rng.uniform(0, 4)
        draw.rectangle((0, base - tall * 0.09, width, base), fill=pick(rng, BOARDS))
        for tag in rng.uniform(0, width, 3):
            draw.rectangle((tag, base - tall * 0.085, tag + width * 0.12, base - 2), fill=pick(rng, PRICE_TAGS))
    return image


def other_package(rng: Generator, draw: ImageDraw.ImageDraw, box: Box) -> None:
    """Another package, roughly: a block of colour with some bands and lines of text."""
    x1, y1, x2, y2 = box
    color = mix(vivid(rng) if rng.random() < 0.65 else WHITE, (95, 90, 85), rng.uniform(0.1, 0.7))
    draw.rectangle(box, fill=color)
    for _ in range(int(rng.integers(1, 4))):
        top = rng.uniform(y1, y2)
        bottom = min(top + rng.uniform(0.05, 0.3) * (y2 - y1), y2)
        draw.rectangle((x1, top, x2, bottom), fill=mix(vivid(rng), color, rng.uniform(0.2, 0.9)))
    for y in np.arange(rng.uniform(y1, y2), y2 - 3, 4):
        draw.line((x1 + 4, y, x1 + rng.uniform(0.5, 0.95) * (x2 - x1), y), fill=mix(color, BLACK, 0.5))


def wood(rng: Generator, size: Size) -> Image.Image:
    """A table top: stretched noise in a wood tone, perhaps in boards."""
    tone = pick(rng, WOODS)
    fine = smooth_noise(rng, size, (3, 60)) * rng.uniform(5, 18) + smooth_noise(rng, size, (2, 12)) * 12
    pixels = np.array(tone, np.float32) + fine[..., None] * np.array([1, 0.85, 0.7], np.float32)
    image = as_picture(pixels)
    if rng.random() < 0.5:
        for y in range(int(rng.integers(10, 60)), size[1], int(rng.integers(30, 90))):
            ImageDraw.Draw(image).line((0, y, size[0], y), fill=mix(tone, BLACK, 0.6))
    return image.transpose(Image.ROTATE_90).resize(size) if rng.random() < 0.4 else image


def tiles(rng: Generator, size: Size) -> Image.Image:
    """Wall or floor tiles with joints."""
    color = pick(rng, ((230, 230, 225), (180, 175, 165), (120, 125, 130), vivid(rng)))
    image, step, joint = Image.new("RGB", size, color), int(rng.integers(25, 90)), mix(color, BLACK, 0.35)
    draw = ImageDraw.Draw(image)
    for y in range(int(rng.integers(step)), size[1], step):
        draw.line((0, y, size[0], y + int(rng.integers(-3, 4))), fill=joint, width=2)
    for x in range(int(rng.integers(step)), size[0], step):
        draw.line((x, 0, x, size[1]), fill=joint, width=2)
    return image


def wall(rng: Generator, size: Size) -> Image.Image:
    """A plain surface under uneven light."""
    color = mix((200, 195, 185), vivid(rng), float(rng.choice([0.05, 0.2, 0.8])))
    return gradient(color, mix(color, BLACK, rng.uniform(0.1, 0.6)), size, rng.random() < 0.5)


def floor(rng: Generator, size: Size) -> Image.Image:
    """Stone, cloth or carpet: grain of two scales."""
    tone = np.array(mix((130, 125, 120), vivid(rng), 0.3), np.float32)
    grain = smooth_noise(rng, size, (size[0] // 3, size[1] // 3)) * rng.uniform(5, 35)
    grain = grain + smooth_noise(rng, size, (6, 6)) * 20
    return as_picture(tone + grain[..., None])


def clutter(rng: Generator, size: Size) -> Image.Image:
    """A kitchen or a desk, undefined things of all colours."""
    image = wall(rng, size)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 16))):
        x, y = rng.uniform(-0.2, 1, 2) * size
        w, h = rng.uniform(0.08, 0.6, 2) * size
        shape = draw.ellipse if rng.random() < 0.35 else draw.rectangle
        shape((x, y, x + w, y + h), fill=mix(vivid(rng), (110, 105, 100), rng.uniform(0, 0.8)))
    return image
