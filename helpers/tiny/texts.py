"""Words, numbers and the texts of a package: ingredients, allergens, best-before date, brand name, plain text."""

import json
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from helpers.tiny.colors import BLACK, WHITE, Panel, contrast, ink_on, mix
from helpers.tiny.printing import LINE_STEP, Sheet, Size, Style, font, pick

WORDS = json.loads(Path(__file__).with_name("nutrient_words.json").read_text(encoding="utf-8"))
LANGUAGES = tuple(WORDS["languages"])
BRAND_FACES = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "DejaVuSans-BoldOblique")


def amount(rng: Generator, comma: bool, unit: str = " g") -> str:
    """A quantity as printed: `3,5 g`, `12 g`, `<0.1 g`."""
    value = float(rng.gamma(0.8, 14))
    text = f"{value:.1f}" if value < 10 or rng.random() < 0.4 else f"{value:.0f}"
    text = text if rng.random() > 0.05 else "<0.1"
    return (text.replace(".", ",") if comma else text) + unit


def energy(rng: Generator, form: int) -> str:
    """Energy in kJ and kcal in one of the usual forms."""
    kilojoule = int(rng.integers(80, 2600))
    calories = round(kilojoule / 4.184)
    return (f"{kilojoule} kJ / {calories} kcal", f"{kilojoule}kJ", f"{kilojoule}/{calories}", f"{calories} kcal")[form]


def food_list(rng: Generator, language: str, count: int) -> str:
    """`count` ingredients with percentages and capitals."""
    foods = WORDS["languages"][language]["foods"]
    parts = []
    for _ in range(count):
        food, chance = pick(rng, foods), rng.random()
        food = food.upper() if chance < 0.12 else food
        parts.append(f"{food} ({rng.integers(1, 60)}%)" if 0.12 < chance < 0.3 else food)
    return ", ".join(parts) + "."


def made_up_word(rng: Generator, syllables: int) -> str:
    """A word that no brand has, hopefully."""
    return "".join(pick(rng, "bcdfghklmnprstvz") + pick(rng, "aeiou") for _ in range(syllables))


def text_panel(rng: Generator, style: Style, share: float) -> Panel:
    """Panel (or None) and ink for a text block; `share` of the blocks have a panel."""
    if rng.random() > share:
        return None, style.ink
    panel = WHITE if rng.random() < 0.5 else mix(style.paper, pick(rng, (WHITE, style.accent)), rng.uniform(0.3, 0.9))
    return panel, ink_on(rng, panel)


def letter_size(rng: Generator, size: Size, lines: tuple[float, float], letters: float) -> int:
    """Size of letters that gives a number of `lines` from a range, or smaller to have about `letters` in a line."""
    return int(min(size[1] / rng.uniform(*lines) / LINE_STEP, size[0] / letters))


def draw_ingredients(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A dense text block that opens with a bold `Ingredients` word; often in several languages."""
    sheet = Sheet(size, style, *text_panel(rng, style, 0.25))
    text_size = max(letter_size(rng, size, (4, 9), 13), 6)
    runs, language = [], style.language
    for _ in range(int(rng.integers(3, 6))):
        head = WORDS["languages"][language]["ingredients"] + ":"
        runs += [(head.upper() if rng.random() < 0.5 else head, True), (food_list(rng, language, 16), False)]
        language = pick(rng, LANGUAGES) if rng.random() < 0.7 else language
    sheet.write_lines(sheet.inside(text_size * 0.4 if sheet.panel else 0), runs, text_size)
    return sheet.image


def draw_allergen_note(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A short boxed warning."""
    words = WORDS["languages"][style.language]
    panel, ink = text_panel(rng, style, 0.8)
    if panel:
        panel = pick(rng, ((250, 220, 60), (240, 240, 235), style.accent, panel))
        ink = ink_on(rng, panel)
    sheet = Sheet(size, style, panel, ink)
    text_size = max(letter_size(rng, size, (2.2, 4.5), 11), 6)
    runs = [(words["contains"].upper() + ":", True), (food_list(rng, style.language, 3).upper(), True)]
    runs += [(words["traces"], False), (food_list(rng, style.language, 6), False)]
    sheet.write_lines(sheet.inside(text_size * 0.5), runs, text_size)
    sheet.frame(text_size // 6)
    return sheet.image


def draw_best_before(rng: Generator, size: Size, style: Style) -> Image.Image:
    """Date and lot in the dots of an inkjet printer, on a blank field."""
    width, height = size
    sign = pick(rng, "./ ")
    date = sign.join(f"{rng.integers(*numbers):02d}" for numbers in ((1, 29), (1, 13), (2024, 2030)))
    lot = f"L{rng.integers(1000, 99999)} {rng.integers(0, 24):02d}:{rng.integers(0, 60):02d}"
    lines = [date, lot] if rng.random() < 0.7 else [date]
    sheet = Sheet(size, style, pick(rng, (WHITE, WHITE, mix(style.paper, WHITE, 0.5), (205, 205, 205))), BLACK)
    head = WORDS["languages"][style.language]["best_before"] + ":"
    sheet.center_text((2, 0, width - 2, height * 0.28), head, style.bold)
    speckle = np.asarray(dot_matrix(lines, (int(width * 0.9), int(height * 0.64))))
    speckle = speckle * (rng.random(speckle.shape) < rng.uniform(0.6, 1))
    sheet.image.paste((40, 40, 60), (int(width * 0.05), int(height * 0.3)), Image.fromarray(speckle.astype(np.uint8)))
    return sheet.image


def dot_matrix(lines: list[str], size: Size) -> Image.Image:
    """Lines of text in coarse dots: a mask of `size`."""
    dots = Image.new("L", (9 * max(map(len, lines)), 12 * len(lines)), 0)
    for index, line in enumerate(lines):
        ImageDraw.Draw(dots).text((1, 12 * index - 1), line, 255, font("DejaVuSansMono-Bold", 12))
    return dots.resize(size, Image.NEAREST)


def draw_brand_name(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A large made-up word: plain, outlined, or on a band."""
    width, height = size
    text = made_up_word(rng, int(np.clip(round(width / height * 0.75), 2, 5)))
    text = text.title() if rng.random() < 0.6 else text.upper()
    face = pick(rng, BRAND_FACES)
    color, band, rim = style.accent if contrast(style.accent, style.paper) > 70 else style.ink, None, 0
    if rng.random() < 0.35:
        color, band = ink_on(rng, color), color
    elif rng.random() < 0.4:
        rim = max(height // 14, 1)
    used = font(face, int(height * 0.75))
    length = used.getlength(text) + height * 0.3
    sheet = Sheet((length, height), style)
    if band:
        radius = height * rng.uniform(0, 0.5)
        sheet.draw.rounded_rectangle((0, 0, sheet.width - 1, height - 1), radius, fill=band)
    stroke = {"stroke_width": rim, "stroke_fill": ink_on(rng, color)}
    sheet.draw.text((length / 2, height * 0.48), text, color, used, "mm", **stroke)
    return sheet.image


def draw_text_block(rng: Generator, size: Size, style: Style) -> Image.Image:
    """Address, storage advice or a recipe: plain lines, no bold opening word; not labelled."""
    sheet = Sheet(size, style)
    words = [made_up_word(rng, int(rng.integers(1, 5))) for _ in range(30)] * 4
    text = " ".join(word.title() if rng.random() < 0.2 else word for word in words)
    text_size = max(letter_size(rng, size, (2, 8), 9), 5)
    sheet.write_lines(sheet.inside(0), [(text, rng.random() < 0.15)], text_size)
    return sheet.image
