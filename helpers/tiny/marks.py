"""Marks and pictures on a package: barcode, logo, recycling mark, badge, picture of food."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from helpers.tiny.colors import BLACK, WHITE, Color, as_color, contrast, ink_on, mix, vivid
from helpers.tiny.printing import Point, Sheet, Size, Style, as_picture, font, pick
from helpers.tiny.texts import WORDS, made_up_word, text_panel

# EAN-13: widths of the stripes of the ten digits, and the codes of the six left digits by the first digit
EAN_WIDTHS = ("3211", "2221", "2122", "1411", "1132", "1231", "1114", "1312", "1213", "3112")
EAN_PARITY = ("LLLLLL", "LLGLGG", "LLGGLG", "LLGGGL", "LGLLGG", "LGGLLG", "LGGGLL", "LGLGLG", "LGLGGL", "LGGLGL")
FOOD_COLORS = ((150, 90, 40), (200, 150, 80), (180, 60, 40), (110, 130, 50), (90, 50, 30), (230, 200, 150))


def with_check_digit(twelve: str) -> str:
    """An EAN-13 code from its first twelve digits."""
    digits = [int(digit) for digit in twelve]
    return twelve + str(-(sum(digits[0::2]) + 3 * sum(digits[1::2])) % 10)


def ean13_bars(code: str) -> str:
    """The 95 modules of an EAN-13 code, `1` for a bar."""
    left = "".join(map(ean13_digit, code[1:7], EAN_PARITY[int(code[0])]))
    right = "".join(ean13_digit(digit, "R") for digit in code[7:])
    return f"101{left}01010{right}101"


def ean13_digit(digit: str, code: str) -> str:
    """Seven modules: code L opens with a space, R with a bar, and G is R backwards."""
    stripes = zip("0101" if code == "L" else "1010", EAN_WIDTHS[int(digit)], strict=True)
    modules = "".join(module * int(width) for module, width in stripes)
    return modules[::-1] if code == "G" else modules


def draw_barcode(rng: Generator, size: Size, style: Style) -> Image.Image:
    """EAN bars with their digits on a light panel (rarely straight on a light package)."""
    module = max(round(size[0] / 110), 1)
    height = max(int(size[1] / size[0] * module * 110), 20)
    panel, bar = WHITE, BLACK
    if rng.random() >= 0.85:
        panel, bar = mix(style.paper, WHITE, 0.75), mix(style.accent, BLACK, 0.8)
    sheet = Sheet((module * 110, height), style, panel, bar)
    code = with_check_digit("".join(map(str, rng.integers(0, 10, 12))))
    digits = 9 * module if rng.random() < 0.9 else 0  # height of the line of digits
    for index, bit in enumerate(ean13_bars(code)):
        if bit == "1":
            x, guard = (9 + index) * module, index < 3 or index > 91 or 45 <= index < 50
            bottom = height - digits * (0.6 if guard else 1) - 2 * module
            sheet.draw.rectangle((x, 3 * module, x + module - 1, bottom), fill=bar)
    if digits:
        used = font("DejaVuSansMono", int(digits * 1.1))
        for start, text in ((1, code[0]), (14, code[1:7]), (60, code[7:])):
            sheet.draw.text((start * module, height - digits - module), text, bar, used)
    return sheet.image


def draw_logo(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A compact emblem: a filled shape with a rim, and letters, a leaf, a star or a figure in it."""
    side = min(size)
    color = style.accent if rng.random() < 0.5 else vivid(rng)
    color = mix(color, BLACK, 0.5) if contrast(color, style.paper) < 50 else color
    sheet = Sheet((side, side), style, ink=ink_on(rng, color))
    emblem(rng, sheet, color)
    inner_figure(rng, sheet, color)
    return sheet.image


def emblem(rng: Generator, sheet: Sheet, color: Color) -> None:
    """The outer shape of a logo."""
    draw, side, rim = sheet.draw, sheet.width, sheet.ink
    middle, end, line, kind = side / 2, side - 1, max(side // 16, 1), int(rng.integers(5))
    if kind == 0:
        draw.ellipse((0, 0, end, end), fill=color)
        draw.ellipse((line, line, end - line, end - line), outline=rim, width=line)
    elif kind == 1:
        draw.rounded_rectangle((0, 0, end, end), side * rng.uniform(0.1, 0.3), fill=color, outline=rim, width=line)
    elif kind == 2:
        shield = ((0, 0), (1, 0), (1, 0.55), (0.75, 0.85), (0.5, 1), (0.25, 0.85), (0, 0.55))
        draw.polygon([(x * end, y * end) for x, y in shield], fill=color, outline=rim, width=line)
    elif kind == 3:
        draw.polygon(star(middle, middle, int(rng.integers(6, 20)), rng.uniform(0.75, 0.95)), fill=color)
    else:
        draw.regular_polygon((middle, middle, middle), int(rng.integers(5, 9)), fill=color, outline=rim)


def star(middle: float, radius: float, points: int, waist: float) -> list[Point]:
    """Corners of a star around (middle, middle)."""
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2, radius * waist, radius)
    return list(zip(middle + radii * np.cos(angles), middle + radii * np.sin(angles), strict=True))


def inner_figure(rng: Generator, sheet: Sheet, color: Color) -> None:
    """What is in a logo: letters, a star, a leaf with its vein, or head and shoulders."""
    draw, side, ink, kind = sheet.draw, sheet.width, sheet.ink, int(rng.integers(4))
    if kind == 0:
        letters = made_up_word(rng, 2)[: int(rng.integers(1, 4))].upper()
        sheet.center_text((side * 0.2, side * 0.25, side * 0.8, side * 0.75), letters)
    elif kind == 1:
        draw.polygon(star(side / 2, side * 0.28, int(rng.integers(4, 12)), rng.uniform(0.35, 0.8)), fill=ink)
    elif kind == 2:
        draw.chord((side * 0.3, side * 0.2, side * 0.95, side * 0.85), 135, 270, fill=ink)
        draw.line((side * 0.3, side * 0.75, side * 0.65, side * 0.35), fill=color, width=max(side // 25, 1))
    else:
        draw.ellipse((side * 0.38, side * 0.2, side * 0.62, side * 0.44), fill=ink)
        draw.pieslice((side * 0.27, side * 0.47, side * 0.73, side * 1.0), 180, 360, fill=ink)


def draw_recycling_mark(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A triangle of arrows, two turning arrows, or a crossed-out bin."""
    side = min(size)
    sheet = Sheet((side, side), style, *text_panel(rng, style, 0.25))
    pick(rng, (arrow_triangle, turning_arrows, crossed_bin))(rng, sheet, max(side // 10, 2))
    return sheet.image


def arrow_triangle(rng: Generator, sheet: Sheet, line: int) -> None:
    """Three arrows around the code of a material."""
    side = sheet.width
    angles = np.deg2rad((-90, 30, 150))
    corners = np.stack([side / 2 + side * 0.42 * np.cos(angles), side * 0.55 + side * 0.42 * np.sin(angles)], 1)
    for start, end in zip(corners, np.roll(corners, -1, 0), strict=True):
        arrow(sheet, start, start + (end - start) * 0.8, line)
    code = pick(rng, ("1", "5", "PP", "21", "41"))
    sheet.center_text((side * 0.3, side * 0.4, side * 0.7, side * 0.75), code)


def arrow(sheet: Sheet, start: np.ndarray, end: np.ndarray, line: int) -> None:
    """A thick arrow between two points."""
    sheet.draw.line((*start, *end), fill=sheet.ink, width=line)
    direction = (end - start) / (np.hypot(*(end - start)) + 1e-6)
    normal = np.array([-direction[1], direction[0]])
    tip, base = end + direction * line, end - direction * line * 0.5
    corners = (tip, base + normal * line * 1.2, base - normal * line * 1.2)
    sheet.draw.polygon([tuple(corner) for corner in corners], fill=sheet.ink)


def turning_arrows(rng: Generator, sheet: Sheet, line: int) -> None:
    """Two arrows that follow each other around a circle."""
    side, middle = sheet.width, sheet.width / 2
    for turn in (0, 180):
        sheet.draw.arc((line, line, side - line, side - line), turn + 15, turn + 150, fill=sheet.ink, width=line)
        angle = np.deg2rad(turn + 155)
        head = (middle + side * 0.36 * np.cos(angle), middle + side * 0.36 * np.sin(angle), line * 1.3)
        sheet.draw.regular_polygon(head, 3, turn, fill=sheet.ink)


def crossed_bin(rng: Generator, sheet: Sheet, line: int) -> None:
    """A bin that is crossed out."""
    draw, ink, side, thin = sheet.draw, sheet.ink, sheet.width, max(line // 2, 1)
    corners = ((0.25, 0.25), (0.75, 0.25), (0.68, 0.85), (0.32, 0.85))
    draw.polygon([(side * x, side * y) for x, y in corners], outline=ink, width=thin)
    draw.rectangle((side * 0.2, side * 0.15, side * 0.8, side * 0.25), fill=ink)
    draw.line((side * 0.08, side * 0.08, side * 0.92, side * 0.92), fill=ink, width=thin)
    draw.line((side * 0.92, side * 0.08, side * 0.08, side * 0.92), fill=ink, width=thin)


def draw_badge(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A ribbon or a pill with a short claim."""
    width, height = size
    color = vivid(rng)
    sheet = Sheet(size, style)
    sheet.draw.rounded_rectangle((0, 0, width - 1, height - 1), height * rng.uniform(0, 0.5), fill=color)
    claim = pick(rng, WORDS["claims"])
    sheet.with_ink(ink_on(rng, color)).center_text((width * 0.08, 0, width * 0.92, height), claim)
    return sheet.image


def draw_food_picture(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A photograph of food, seen from far: warm blotches and shaded round things in an oval or a rectangle."""
    width, height = size
    base = np.array(pick(rng, FOOD_COLORS))
    blotches = as_picture(base + rng.normal(0, 40, (5, 5, 1)) + rng.normal(0, 15, (5, 5, 3)))
    image = blotches.resize(size, Image.BICUBIC).convert("RGBA")
    draw, radius = ImageDraw.Draw(image), min(size) * rng.uniform(0.08, 0.25)
    for _ in range(int(rng.integers(0, 25))):
        color = as_color(np.clip(base + rng.normal(0, 35, 3), 0, 255))
        middle = (rng.uniform(0, width), rng.uniform(0, height))
        ball(draw, middle, radius * rng.uniform(0.6, 1.2), color)
    mask = Image.new("L", size, 0)
    shape = pick(rng, (ImageDraw.ImageDraw.ellipse, ImageDraw.ImageDraw.rectangle, ImageDraw.ImageDraw.ellipse))
    shape(ImageDraw.Draw(mask), (0, 0, width - 1, height - 1), fill=255)
    image.putalpha(mask)
    return image


def ball(draw: ImageDraw.ImageDraw, middle: Point, radius: float, color: Color) -> None:
    """A shaded round thing: three discs, each smaller, lighter and nearer the light."""
    for step, share in enumerate((0.0, 0.15, 0.35)):
        r = radius * (1 - 0.3 * step)
        x, y = (value - radius * 0.12 * step for value in middle)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=mix(mix(color, BLACK, 0.25), WHITE, share))
