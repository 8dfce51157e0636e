"""Drawings of what is printed on a food package: nutrition tables, and the eight other things that are labelled.

Every `draw_*` function takes a numpy Generator, the wanted size in pixels (width, height) and a `Style`, and returns
an RGBA patch; transparent pixels show the package. A patch may come out at another size than asked for (text has a
natural width): `fit` resizes it, which condenses or widens the letters as printers do. `packages.py` puts the patches
together; this module has no command of its own.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Size = tuple[int, int]

FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
WORDS = json.loads(Path(__file__).with_name("nutrient_words.json").read_text(encoding="utf-8"))
LANGUAGES = tuple(WORDS["languages"])
REGULAR = ("DejaVuSans", "DejaVuSans", "DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Oblique")
BOLD = {
    "DejaVuSans": "DejaVuSans-Bold",
    "DejaVuSans-Oblique": "DejaVuSans-BoldOblique",
    "DejaVuSerif": "DejaVuSerif-Bold",
    "DejaVuSansMono": "DejaVuSansMono-Bold",
}
BLACK, WHITE = (18, 18, 20), (250, 250, 248)


@dataclass(frozen=True)
class Style:
    """How one package is printed."""

    paper: Color  # what the text is printed on
    ink: Color  # text
    accent: Color  # brand colour
    face: str  # font file without its ending
    language: str  # key of WORDS["languages"]


@lru_cache(maxsize=512)
def font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """One font of matplotlib's bundle; `size` in pixels."""
    return ImageFont.truetype(FONT_FOLDER / f"{face}.ttf", max(size, 4), layout_engine=ImageFont.Layout.BASIC)


def pick(rng: np.random.Generator, items):
    """One item of a sequence, without numpy's conversion of its type."""
    return items[int(rng.integers(len(items)))]


def luminance(color: Color) -> float:
    """Brightness as seen, 0..255."""
    return 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]


def mix(first: Color, second: Color, share: float) -> Color:
    """`share` of the second colour in the first."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def ink_on(rng: np.random.Generator, paper: Color) -> Color:
    """A text colour that can be read on `paper`: mostly black or white, sometimes tinted."""
    base = BLACK if luminance(paper) > rng.uniform(90, 150) else WHITE
    tint = tuple(int(v) for v in rng.integers(0, 256, 3))
    return mix(base, tint, float(rng.choice([0, 0, 0.1, 0.3])))


def vivid(rng: np.random.Generator) -> Color:
    """A printing colour: any hue, saturated more often than not."""
    hue, saturation, value = rng.uniform(0, 6), rng.beta(3, 1.5), rng.beta(3, 1.6)
    wheel = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return tuple(int(v) for v in 255 * value * (1 - saturation + saturation * wheel))


def sheet(size: Size, fill: Color | None = None) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A transparent (or filled) patch and the pen for it."""
    image = Image.new("RGBA", (max(int(size[0]), 2), max(int(size[1]), 2)), (*fill, 255) if fill else (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    return image, draw


def fit(patch: Image.Image, size: Size, max_anisotropy: float = 1.3) -> Image.Image:
    """The patch without its transparent margin, inside `size`; stretched by `max_anisotropy` at most."""
    patch = patch.crop(patch.getbbox())
    across, down = size[0] / patch.width, size[1] / patch.height
    across, down = min(across, down * max_anisotropy), min(down, across * max_anisotropy)
    return patch.resize((max(round(patch.width * across), 2), max(round(patch.height * down), 2)), Image.BILINEAR)


# ---- numbers and texts ---------------------------------------------------------------------------------------------


def amount(rng: np.random.Generator, comma: bool, unit: str = " g") -> str:
    """A quantity as printed: `3,5 g`, `12 g`, `<0.1 g`."""
    value = float(rng.gamma(0.8, 14))
    text = f"{value:.1f}" if value < 10 or rng.random() < 0.4 else f"{value:.0f}"
    text = text if rng.random() > 0.05 else "<0.1"
    return (text.replace(".", ",") if comma else text) + unit


def energy(rng: np.random.Generator, form: int) -> str:
    """Energy in kJ and kcal in one of the usual forms."""
    kilojoule = int(rng.integers(80, 2600))
    calories = round(kilojoule / 4.184)
    return (f"{kilojoule} kJ / {calories} kcal", f"{kilojoule}kJ", f"{kilojoule}/{calories}", f"{calories} kcal")[form]


def food_list(rng: np.random.Generator, language: str, count: int) -> str:
    """`count` ingredients with percentages, brackets and E-numbers."""
    foods = WORDS["languages"][language]["foods"]
    parts = []
    for _ in range(count):
        food, chance = pick(rng, foods), rng.random()
        food = food.upper() if chance < 0.12 else food
        parts.append(f"{food} ({rng.integers(1, 60)}%)" if 0.12 < chance < 0.3 else food)
    return ", ".join(parts) + "."


def made_up_word(rng: np.random.Generator, syllables: int) -> str:
    """A word that no brand has, hopefully."""
    return "".join(pick(rng, "bcdfghklmnprstvz") + pick(rng, "aeiou") for _ in range(syllables))


def write_lines(draw, box, runs, size, ink, face) -> float:
    """Fill box (x1, y1, x2, y2) with the words of `runs` [(text, bold)], line by line; the y below the last line."""
    left, top, right, bottom = box
    x, y, step = left, top, size * 1.18
    for text, bold in runs:
        used = font(BOLD[face] if bold else face, size)
        for word in text.split():
            length = used.getlength(word)
            if x + length > right and x > left:
                x, y = left, y + step
            if y + size > bottom + 1:
                return y
            draw.text((x, y), word, fill=ink, font=used)
            x += length + size * 0.3
    return y + step


def center_text(draw, box, text, face, ink, largest=10**6) -> None:
    """One line as large as the box (x1, y1, x2, y2) allows, in its middle."""
    width, height = box[2] - box[0], box[3] - box[1]
    probe = font(face, 20).getlength(text) / 20
    size = int(min(height * 0.85, width / max(probe, 0.1), largest))
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    draw.text(middle, text, fill=ink, font=font(face, size), anchor="mm")


# ---- nutrition tables ----------------------------------------------------------------------------------------------


def table_colors(rng: np.random.Generator, style: Style) -> tuple[Color | None, Color]:
    """Panel (None: printed directly on the artwork) and ink."""
    chance = rng.random()
    if chance < 0.42:
        return None, style.ink
    panel = WHITE if chance < 0.8 else vivid(rng) if chance < 0.88 else mix(style.paper, WHITE, 0.6)
    panel = BLACK if chance > 0.96 else panel
    return panel, ink_on(rng, panel)


def row_labels(rng: np.random.Generator, language: str) -> list[str]:
    """The eight EU rows, in one language or several divided by a slash."""
    chance = rng.random()
    others = [pick(rng, LANGUAGES) for _ in range(0 if chance < 0.65 else 1 if chance < 0.85 else 2)]
    columns = [WORDS["languages"][code]["rows"] for code in (language, *others)]
    return [" / ".join(dict.fromkeys(labels)) for labels in zip(*columns, strict=True)]


def eu_content(rng: np.random.Generator, style: Style, count: int, columns: int) -> tuple[str, list[list[str]]]:
    """Title and rows of cells of a per-100 g table; the first row is the head, `count` the wanted number of rows."""
    words, comma = WORDS["languages"][style.language], rng.random() < 0.7
    labels = row_labels(rng, style.language)
    if count < 8:
        labels = [labels[i] for i in (0, 1, 3, 6, 7, 4, 2)[: max(count - 1, 3)]]
    labels += [pick(rng, WORDS["vitamins"]) for _ in range(max(count - 9, 0))]
    unit, form = pick(rng, (" g", "g", " g", "")), int(rng.integers(4)) if columns > 1 else int(rng.integers(2)) * 3
    heads = [words["per"], f"{rng.integers(15, 330)} {pick(rng, ('g', 'ml'))}", "% RI*", "% *"]
    rows = [[pick(rng, ("", words["title"])), *heads[:columns]]]
    for index, label in enumerate(labels):
        cells = [energy(rng, form) if index == 0 else amount(rng, comma, unit) for _ in range(columns)]
        rows.append([label, *(c if k < 2 else f"{rng.integers(0, 60)} %" for k, c in enumerate(cells))])
    return words["title"], rows


def world_content(rng: np.random.Generator, style: Style, count: int, columns: int) -> tuple[str, list[list[str]]]:
    """Title and rows of cells as printed in Australia, Brazil, India, Mexico."""
    words = pick(rng, tuple(WORDS["world"].values()))
    heads = words["columns"][:columns]
    rows = [["", *heads]]
    for label in words["rows"][: max(count - 1, 4)]:
        rows.append([label, *(amount(rng, False, pick(rng, ("g", "", " mg"))) for _ in heads)])
    return words["title"], rows


def column_widths(rows: list[list[str]], face: str, size: int) -> list[float]:
    """Natural width of each column at a font size, with the gap after it."""
    measure = font(BOLD[face], size).getlength
    return [max(measure(cell) for cell in column) + size * 0.9 for column in zip(*rows, strict=True)]


def draw_grid(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A table of rows and columns as on most packages: head, rows, number columns, with many decorations."""
    width, height = size
    count = int(np.clip(rng.normal(9 if height > 0.6 * width else 7.5, 2), 4, 8 + 8 * height / width))
    columns = int(rng.choice([1, 2, 3, 4], p=[0.42, 0.33, 0.17, 0.08])) if width > 0.6 * height else 1
    content = eu_content if rng.random() < 0.8 else world_content
    title, rows = content(rng, style, count, columns)
    panel, ink = table_colors(rng, style)
    titled = rng.random() < 0.55
    row_height = height / (len(rows) + 1.5 * titled)
    text_size = int(np.clip(row_height * rng.uniform(0.6, 0.86), 5, 60))
    widths = column_widths(rows, style.face, text_size)
    if sum(widths) > width:  # long labels: smaller print, and the rest is left to `fit`, which condenses
        text_size = max(int(text_size * max((width / sum(widths)) ** 0.85, 0.42)), 5)
        widths = column_widths(rows, style.face, text_size)
    widths = spread(rng, widths, width)
    image, draw = sheet((sum(widths) + text_size * 0.5, height), panel)
    top = draw_title(rng, draw, (image.width, 1.5 * row_height), title, style, ink, panel) if titled else 0
    decorate_grid(rng, draw, (0, top, image.width - 1, height - 1), len(rows), widths, ink, style.accent, panel)
    write_cells(rng, draw, rows, top, row_height, widths, text_size, ink, style.face)
    return round_corners(image, rng) if panel and rng.random() < 0.25 else image


def spread(rng: np.random.Generator, widths: list[float], width: float) -> list[float]:
    """Share out the spare width: to the label column, or to all columns alike."""
    spare = max(width - sum(widths), 0)
    if rng.random() < 0.5:
        return [widths[0] + spare, *widths[1:]]
    return [value + spare / len(widths) for value in widths]


def draw_title(rng, draw, size, title, style, ink, panel) -> float:
    """The title line of a table, plain or on a bar of the brand's colour; its height."""
    width, height = size
    title = title.upper() if rng.random() < 0.4 else title
    if rng.random() < 0.3:
        bar = style.accent if rng.random() < 0.6 or panel is None else mix(panel, ink, 0.85)
        draw.rectangle((0, 0, width, height * 0.92), fill=bar)
        ink = ink_on(rng, bar)
    largest = height * rng.uniform(0.5, 0.85)
    if rng.random() < 0.5:
        center_text(draw, (width * 0.03, 0, width * 0.97, height * 0.92), title, BOLD[style.face], ink, largest)
    else:
        length = font(BOLD[style.face], 20).getlength(title) / 20
        used = font(BOLD[style.face], int(min(largest, width * 0.95 / length)))
        draw.text((height * 0.15, height * 0.45), title, fill=ink, font=used, anchor="lm")
    return height


def decorate_grid(rng, draw, box, count, widths, ink, accent, panel) -> None:
    """Zebra rows, a head bar, rules between rows and columns, a frame: each or none."""
    left, top, right, bottom = box
    step, line = (bottom - top) / count, max(int((bottom - top) / count * rng.uniform(0.02, 0.1)), 1)
    paper = panel or mix(ink, (128, 128, 128), 0.7)
    rule = mix(paper, ink, rng.uniform(0.3, 1.0))
    if rng.random() < 0.22:
        shade = mix(paper, accent if rng.random() < 0.6 else ink, rng.uniform(0.1, 0.35))
        for row in range(int(rng.integers(2)), count, 2):
            draw.rectangle((left, top + row * step, right, top + (row + 1) * step), fill=shade)
    if rng.random() < 0.25:
        draw.rectangle((left, top, right, top + step), fill=mix(paper, accent, rng.uniform(0.3, 0.7)))
    if rng.random() < 0.62:
        for row in range(1, count):
            draw.line((left, top + row * step, right, top + row * step), fill=rule, width=line)
    if rng.random() < 0.35:
        for x in np.cumsum(widths)[:-1]:
            draw.line((x, top, x, bottom), fill=rule, width=line)
    if rng.random() < 0.5:
        draw.rectangle((left, 0 if rng.random() < 0.5 else top, right, bottom), outline=rule, width=line + 1)


def write_cells(rng, draw, rows, top, row_height, widths, size, ink, face) -> None:
    """Labels to the left (sub-rows indented), numbers to the right or in the middle of their columns."""
    bold_all, bold_labels, centered = rng.random() < 0.2, rng.random() < 0.25, rng.random() < 0.35
    ends = np.cumsum(widths)
    for index, cells in enumerate(rows):
        y = top + (index + 0.5) * row_height
        heavy = bold_all or index == 0 or (index == 1 and bold_labels)
        indent = size * (0.8 if index in (3, 5) and len(rows) > 7 else 0.3)
        used = font(BOLD[face] if heavy or bold_labels else face, size)
        draw.text((indent, y), cells[0], fill=ink, font=used, anchor="lm")
        used = font(BOLD[face] if heavy else face, size)
        for column, cell in enumerate(cells[1:], start=1):
            x = ends[column] - widths[column] / 2 if centered else ends[column] - size * 0.3
            draw.text((x, y), cell, fill=ink, font=used, anchor="mm" if centered else "rm")


def round_corners(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut the corners of a panel."""
    mask = Image.new("L", image.size, 0)
    radius = min(image.size) * rng.uniform(0.03, 0.12)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, image.width - 1, image.height - 1), radius, fill=255)
    image.putalpha(mask)
    return image


def facts_rows(rng: np.random.Generator, words: dict) -> list[tuple[str, str, bool]]:
    """Rows (label, percentage, bold) of a North American table."""
    rows = []
    for label in words["rows"]:
        label = label.replace("_", str(rng.integers(1, 30)))
        bold = label.startswith(("Total F", "Chol", "Sod", "Total C", "Prot", "Fat", "Carb"))
        rows.append((f"{label} {rng.integers(0, 40)}{pick(rng, ('g', 'g', 'mg'))}", f"{rng.integers(0, 60)}%", bold))
    return rows


def draw_facts(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """The North American vertical table: heavy title, thick bars, the calories line, percentages, a footnote."""
    width, height = size
    words = WORDS["us"] if rng.random() < 0.7 else WORDS["ca"]
    panel, ink = (WHITE, BLACK) if rng.random() < 0.75 else table_colors(rng, style)
    rows, foot = facts_rows(rng, words), int(rng.integers(0, 4))
    vitamins = [(f"{name} {rng.integers(0, 300)}mg", f"{rng.integers(0, 30)}%", False) for name in words["vitamins"]]
    drop = int(rng.integers(0, 4))
    rows = rows[: len(rows) - drop]
    unit = height / (6.6 + len(rows) + len(vitamins) + 0.75 * foot)
    natural = unit * 0.72 * 0.58 * max(len(row[0]) + 6 for row in rows)
    image, draw = sheet((max(width, natural), height), panel)
    y = facts_head(rng, draw, image.width, unit, words, ink)
    y = facts_body(draw, image.width, y, unit, rows, ink)
    draw.rectangle((unit * 0.3, y, image.width - unit * 0.3, y + unit * 0.4), fill=ink)
    y = facts_body(draw, image.width, y + unit * 0.5, unit, vitamins, ink)
    draw.rectangle((unit * 0.3, y, image.width - unit * 0.3, y + unit * 0.2), fill=ink)
    box = (unit * 0.4, y + unit * 0.3, image.width - unit * 0.3, height - unit * 0.2)
    if foot:
        write_lines(draw, box, [(words["foot"], False)], int(unit * 0.55), ink, "DejaVuSans")
    if rng.random() < 0.85:
        draw.rectangle((0, 0, image.width - 1, height - 1), outline=ink, width=max(int(unit * 0.13), 1))
    return image


def facts_head(rng, draw, width, unit, words, ink) -> float:
    """Title, serving lines, thick bar and calories of a North American table; the y below."""
    title = words["title"] if rng.random() < 0.5 else words["title"].split(" / ")[0]
    center_text(draw, (unit * 0.3, 0, width - unit * 0.3, unit * 1.9), title, "DejaVuSans-Bold", ink)
    plain, heavy = font("DejaVuSans", int(unit * 0.7)), font("DejaVuSans-Bold", int(unit * 0.75))
    draw.text(
        (unit * 0.4, unit * 2.2), f"{rng.integers(2, 20)} servings per container", fill=ink, font=plain, anchor="lm"
    )
    draw.text((unit * 0.4, unit * 3.1), "Serving size", fill=ink, font=heavy, anchor="lm")
    draw.text((width - unit * 0.4, unit * 3.1), f"{rng.integers(15, 300)}g", fill=ink, font=heavy, anchor="rm")
    draw.rectangle((unit * 0.3, unit * 3.6, width - unit * 0.3, unit * 4.15), fill=ink)
    large = font("DejaVuSans-Bold", int(unit * 1.35))
    draw.text((unit * 0.4, unit * 5), "Calories", fill=ink, font=large, anchor="lm")
    draw.text((width - unit * 0.4, unit * 5), f"{rng.integers(3, 60) * 10}", fill=ink, font=large, anchor="rm")
    draw.rectangle((unit * 0.3, unit * 5.75, width - unit * 0.3, unit * 6), fill=ink)
    return unit * 6.1


def facts_body(draw, width, y, unit, rows, ink) -> float:
    """Ruled rows with a percentage to the right; the y below."""
    plain, heavy = font("DejaVuSans", int(unit * 0.72)), font("DejaVuSans-Bold", int(unit * 0.72))
    for label, percent, bold in rows:
        x = unit * (0.4 if bold else 1.1)
        draw.text((x, y + unit * 0.5), label, fill=ink, font=heavy if bold else plain, anchor="lm")
        draw.text((width - unit * 0.4, y + unit * 0.5), percent, fill=ink, font=heavy, anchor="rm")
        y += unit
        draw.line((unit * 0.3, y, width - unit * 0.3, y), fill=ink, width=max(int(unit * 0.07), 1))
    return y


def draw_tabular(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """The wide North American table: title block to the left, two blocks of rows beside it."""
    width, height = size
    panel, ink = (WHITE, BLACK) if rng.random() < 0.75 else table_colors(rng, style)
    rows, per_block = facts_rows(rng, WORDS["us"]), int(rng.integers(4, 6))
    unit = height / (per_block + 1.3)
    block = max(width * 0.36, unit * 0.7 * 0.58 * 30)
    image, draw = sheet((block * 2.8, height), panel)
    left = block * 0.8
    title = ("Nutrition", "Facts") if rng.random() < 0.6 else ("Valeur", "nutritive")
    for line, text in enumerate(title):
        box = (unit * 0.2, height * 0.24 * line, left - unit * 0.2, height * 0.24 * (line + 1))
        center_text(draw, box, text, "DejaVuSans-Bold", ink)
    draw.text(
        (unit * 0.3, height * 0.58),
        f"Serv. size {rng.integers(15, 300)}g",
        fill=ink,
        font=font(style.face, int(unit * 0.6)),
        anchor="lm",
    )
    box = (unit * 0.2, height * 0.68, left - unit * 0.2, height * 0.95)
    center_text(draw, box, f"Calories {rng.integers(3, 60) * 10}", "DejaVuSans-Bold", ink)
    for index in range(2):
        x = left + block * index
        part = image.crop((0, 0, int(block), image.height))
        part.paste((*panel, 255) if panel else (0, 0, 0, 0), (0, 0, *part.size))
        facts_body(
            ImageDraw.Draw(part), part.width, unit * 0.8, unit, rows[index * per_block : (index + 1) * per_block], ink
        )
        image.paste(part, (int(x), 0))
        draw.rectangle((x + unit * 0.3, unit * 0.3, x + block - unit * 0.3, unit * 0.6), fill=ink)
    if rng.random() < 0.85:
        draw.rectangle((0, 0, image.width - 1, height - 1), outline=ink, width=max(int(unit * 0.13), 1))
    return image


def draw_linear(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A table without columns: one paragraph of nutrients, opened by its title."""
    width, height = size
    words = WORDS["languages"][style.language]
    panel, ink = table_colors(rng, style)
    image, draw = sheet(size, panel)
    lines = float(np.clip(height / width * 14, 2, 12))
    text_size = max(int(height / lines / 1.3), 5)
    runs = [((words["title"] + " " + words["per"] + ":"), True)]
    comma = rng.random() < 0.6
    for _ in range(4):
        for index, label in enumerate(words["rows"]):
            runs += [
                (label, rng.random() < 0.2),
                (energy(rng, 0) + ";" if index == 0 else amount(rng, comma) + ",", False),
            ]
    pad = text_size * 0.35
    write_lines(draw, (pad, pad, width - pad, height - pad), runs, text_size, ink, style.face)
    if rng.random() < 0.55:
        draw.rectangle((0, 0, width - 1, height - 1), outline=ink, width=max(text_size // 9, 1))
    return image


def draw_strip(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A table that lies on its side: one column per nutrient, values below the names."""
    width, height = size
    panel, ink = table_colors(rng, style)
    title, rows = eu_content(rng, style, int(rng.integers(5, 9)), int(rng.integers(1, 3)))
    names = [row[0].split(" / ")[0] for row in rows[1:]]
    lines = [names, *([row[k] for row in rows[1:]] for k in range(1, len(rows[0])))]
    titled = rng.random() < 0.6
    step = height / (len(lines) + titled)
    image, draw = sheet((max(width, step * 1.7 * len(names)), height), panel)
    column = image.width / len(names)
    for row, cells in enumerate(lines):
        for index, cell in enumerate(cells):
            box = (index * column + 2, (row + titled) * step, (index + 1) * column - 2, (row + titled + 1) * step)
            center_text(draw, box, cell, BOLD[style.face] if row == 0 else style.face, ink, step * 0.5)
    if titled:
        draw_title(rng, draw, (image.width, step), title, style, ink, panel)
    decorate_strip(rng, draw, image.size, len(names), len(lines) + titled, ink)
    return image


def decorate_strip(rng, draw, size, columns, lines, ink) -> None:
    """Rules and frame of a table on its side."""
    width, height = size
    line = max(int(height / lines * 0.05), 1)
    if rng.random() < 0.7:
        for row in range(1, lines):
            draw.line((0, row * height / lines, width, row * height / lines), fill=ink, width=line)
    if rng.random() < 0.6:
        for column in range(1, columns):
            draw.line(
                (column * width / columns, height / lines, column * width / columns, height), fill=ink, width=line
            )
    if rng.random() < 0.7:
        draw.rectangle((0, 0, width - 1, height - 1), outline=ink, width=line)


def draw_nutrition_table(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A nutrition table of a layout that suits the aspect of `size`."""
    aspect, chance = size[0] / size[1], rng.random()
    if aspect > 3:
        return pick(rng, (draw_linear, draw_strip, draw_tabular))(rng, size, style)
    if aspect > 1.7 and chance < 0.45:
        return pick(rng, (draw_linear, draw_strip, draw_tabular, draw_tabular))(rng, size, style)
    if aspect < 1 and chance < 0.32:
        return draw_facts(rng, size, style)
    if chance > 0.95 and aspect > 1.1:
        return draw_linear(rng, size, style)
    return draw_grid(rng, size, style)


# ---- the other labelled objects ------------------------------------------------------------------------------------

EAN_LEFT = (
    "0001101",
    "0011001",
    "0010011",
    "0111101",
    "0100011",
    "0110001",
    "0101111",
    "0111011",
    "0110111",
    "0001011",
)
EAN_PARITY = ("LLLLLL", "LLGLGG", "LLGGLG", "LLGGGL", "LGLLGG", "LGGLLG", "LGGGLL", "LGLGLG", "LGLGGL", "LGGLGL")


def with_check_digit(twelve: str) -> str:
    """An EAN-13 code from its first twelve digits."""
    digits = [int(digit) for digit in twelve]
    return twelve + str(-(sum(digits[0::2]) + 3 * sum(digits[1::2])) % 10)


def ean13_bars(code: str) -> str:
    """The 95 modules of an EAN-13 code, `1` for a bar."""
    left, right = "", ""
    for digit, parity in zip(code[1:7], EAN_PARITY[int(code[0])], strict=True):
        pattern = EAN_LEFT[int(digit)]
        inverted = pattern.translate(str.maketrans("01", "10"))
        left += pattern if parity == "L" else inverted[::-1]
    for digit in code[7:]:
        right += EAN_LEFT[int(digit)].translate(str.maketrans("01", "10"))
    return f"101{left}01010{right}101"


def draw_barcode(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """EAN bars with their digits on a light panel (rarely straight on a light package)."""
    module = max(round(size[0] / 110), 1)
    width, height = module * 110, max(int(size[1] / size[0] * module * 110), 20)
    panel, bar = (
        (WHITE, BLACK) if rng.random() < 0.85 else (mix(style.paper, WHITE, 0.75), mix(style.accent, BLACK, 0.8))
    )
    image, draw = sheet((width, height), panel)
    code = with_check_digit("".join(map(str, rng.integers(0, 10, 12))))
    digits = 9 * module if rng.random() < 0.9 else 0
    for index, bit in enumerate(ean13_bars(code)):
        if bit == "1":
            x, guard = (9 + index) * module, index < 3 or index > 91 or 45 <= index < 50
            draw.rectangle(
                (x, 3 * module, x + module - 1, height - digits * (0.6 if guard else 1) - 2 * module), fill=bar
            )
    for start, text in ((1, code[0]), (14, code[1:7]), (60, code[7:])) if digits else ():
        draw.text(
            (start * module, height - digits - module), text, fill=bar, font=font("DejaVuSansMono", int(digits * 1.1))
        )
    return image


def text_panel(rng: np.random.Generator, style: Style, share: float) -> tuple[Color | None, Color]:
    """Panel (or None) and ink for a text block; `share` of the blocks have a panel."""
    if rng.random() > share:
        return None, style.ink
    panel = WHITE if rng.random() < 0.5 else mix(style.paper, pick(rng, (WHITE, style.accent)), rng.uniform(0.3, 0.9))
    return panel, ink_on(rng, panel)


def draw_ingredients(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A dense text block that opens with a bold `Ingredients` word; often in several languages."""
    width, height = size
    panel, ink = text_panel(rng, style, 0.25)
    image, draw = sheet(size, panel)
    text_size = max(int(min(height / rng.uniform(4, 9) / 1.18, width / 13)), 6)
    runs, language = [], style.language
    for _ in range(int(rng.integers(3, 6))):
        head = WORDS["languages"][language]["ingredients"] + ":"
        runs += [(head.upper() if rng.random() < 0.5 else head, True), (food_list(rng, language, 16), False)]
        language = pick(rng, LANGUAGES) if rng.random() < 0.7 else language
    pad = text_size * 0.4 if panel else 0
    write_lines(draw, (pad, pad, width - pad, height - pad), runs, text_size, ink, style.face)
    return image


def draw_allergen_note(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A short boxed warning."""
    width, height = size
    words = WORDS["languages"][style.language]
    panel, ink = text_panel(rng, style, 0.8)
    panel = pick(rng, ((250, 220, 60), (240, 240, 235), style.accent, panel)) if panel else None
    ink = ink_on(rng, panel) if panel else ink
    image, draw = sheet(size, panel)
    text_size = max(int(min(height / rng.uniform(2.2, 4.5) / 1.18, width / 11)), 6)
    runs = [(words["contains"].upper() + ":", True), (food_list(rng, style.language, 3).upper(), True)]
    runs += [(words["traces"], False), (food_list(rng, style.language, 6), False)]
    pad = text_size * 0.5
    write_lines(draw, (pad, pad, width - pad, height - pad), runs, text_size, ink, style.face)
    draw.rectangle((0, 0, width - 1, height - 1), outline=ink, width=max(text_size // 6, 1))
    return image


def draw_best_before(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """Date and lot in the dots of an inkjet printer, on a blank field."""
    width, height = size
    date = pick(rng, "./ ").join(
        (f"{rng.integers(1, 29):02d}", f"{rng.integers(1, 13):02d}", f"20{rng.integers(24, 30)}")
    )
    lot = f"L{rng.integers(1000, 99999)} {rng.integers(0, 24):02d}:{rng.integers(0, 60):02d}"
    lines = [date, lot][: 1 + (rng.random() < 0.7)]
    field = pick(rng, (WHITE, WHITE, mix(style.paper, WHITE, 0.5), (205, 205, 205)))
    image, draw = sheet(size, field)
    head = WORDS["languages"][style.language]["best_before"] + ":"
    center_text(draw, (2, 0, width - 2, height * 0.28), head, BOLD[style.face], BLACK)
    dots = Image.new("L", (9 * max(map(len, lines)), 12 * len(lines)), 0)
    for index, line in enumerate(lines):
        ImageDraw.Draw(dots).text((1, 12 * index - 1), line, fill=255, font=font("DejaVuSansMono-Bold", 12))
    dots = dots.resize((int(width * 0.9), int(height * 0.64)), Image.NEAREST)
    speckle = np.asarray(dots) * (rng.random((dots.height, dots.width)) < rng.uniform(0.6, 1))
    image.paste((40, 40, 60), (int(width * 0.05), int(height * 0.3)), Image.fromarray(speckle.astype(np.uint8)))
    return image


def draw_logo(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A compact emblem: a filled shape with a rim, and letters, a leaf, a star or a figure in it."""
    side = min(size)
    image, draw = sheet((side, side))
    color = style.accent if rng.random() < 0.5 else vivid(rng)
    color = mix(color, BLACK, 0.5) if abs(luminance(color) - luminance(style.paper)) < 50 else color
    inner = ink_on(rng, color)
    emblem(rng, draw, side, color, inner)
    middle, kind = side / 2, int(rng.integers(4))
    if kind == 0:
        letters = made_up_word(rng, 2)[: int(rng.integers(1, 4))].upper()
        center_text(draw, (side * 0.2, side * 0.25, side * 0.8, side * 0.75), letters, "DejaVuSans-Bold", inner)
    elif kind == 1:
        draw.polygon(star(middle, middle, side * 0.28, int(rng.integers(4, 12)), rng.uniform(0.35, 0.8)), fill=inner)
    elif kind == 2:
        box = (side * 0.3, side * 0.2, side * 0.95, side * 0.85)
        draw.chord(box, 135, 270, fill=inner)
        draw.line((side * 0.3, side * 0.75, side * 0.65, side * 0.35), fill=color, width=max(side // 25, 1))
    else:
        draw.ellipse((side * 0.38, side * 0.2, side * 0.62, side * 0.44), fill=inner)
        draw.pieslice((side * 0.27, side * 0.47, side * 0.73, side * 1.0), 180, 360, fill=inner)
    return image


def emblem(rng, draw, side, color, rim) -> None:
    """The outer shape of a logo."""
    kind, line, box = int(rng.integers(5)), max(side // 16, 1), (0, 0, side - 1, side - 1)
    if kind == 0:
        draw.ellipse(box, fill=color)
        draw.ellipse((line, line, side - 1 - line, side - 1 - line), outline=rim, width=line)
    elif kind == 1:
        draw.rounded_rectangle(box, side * rng.uniform(0.1, 0.3), fill=color, outline=rim, width=line)
    elif kind == 2:
        shield = ((0, 0), (1, 0), (1, 0.55), (0.75, 0.85), (0.5, 1), (0.25, 0.85), (0, 0.55))
        draw.polygon([(x * (side - 1), y * (side - 1)) for x, y in shield], fill=color, outline=rim, width=line)
    elif kind == 3:
        draw.polygon(star(side / 2, side / 2, side / 2, int(rng.integers(6, 20)), rng.uniform(0.75, 0.95)), fill=color)
    else:
        draw.regular_polygon((side / 2, side / 2, side / 2), int(rng.integers(5, 9)), fill=color, outline=rim)


def star(x: float, y: float, radius: float, points: int, waist: float) -> list[tuple[float, float]]:
    """Corners of a star."""
    angles = np.arange(2 * points) * np.pi / points - np.pi / 2
    radii = np.where(np.arange(2 * points) % 2, radius * waist, radius)
    return list(zip(x + radii * np.cos(angles), y + radii * np.sin(angles), strict=True))


def draw_brand_name(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A large made-up word: plain, outlined, or on a band."""
    width, height = size
    text = made_up_word(rng, int(np.clip(round(width / height * 0.75), 2, 5)))
    text = text.title() if rng.random() < 0.6 else text.upper()
    face = pick(rng, ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "DejaVuSans-BoldOblique"))
    color = style.accent if abs(luminance(style.accent) - luminance(style.paper)) > 70 else style.ink
    band, rim = None, 0
    if rng.random() < 0.35:
        band, color = color, ink_on(rng, color)
    elif rng.random() < 0.4:
        rim = max(height // 14, 1)
    used = font(face, int(height * 0.75))
    length = used.getlength(text) + height * 0.3
    image, draw = sheet((length, height))
    if band:
        draw.rounded_rectangle((0, 0, image.width - 1, height - 1), height * rng.uniform(0, 0.5), fill=band)
    draw.text(
        (length / 2, height * 0.48),
        text,
        fill=color,
        font=used,
        anchor="mm",
        stroke_width=rim,
        stroke_fill=ink_on(rng, color),
    )
    return image


def draw_recycling_mark(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A triangle of arrows, two turning arrows, or a crossed-out bin."""
    side = min(size)
    panel, ink = text_panel(rng, style, 0.25)
    image, draw = sheet((side, side), panel)
    kind, line, middle = int(rng.integers(3)), max(side // 10, 2), side / 2
    if kind == 0:
        corners = [
            (middle + side * 0.42 * np.cos(a), side * 0.55 + side * 0.42 * np.sin(a))
            for a in np.deg2rad((-90, 30, 150))
        ]
        for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
            arrow(draw, start, tuple(np.add(start, np.subtract(end, start) * 0.8)), line, ink)
        center_text(
            draw,
            (side * 0.3, side * 0.4, side * 0.7, side * 0.75),
            pick(rng, ("1", "5", "PP", "21", "41")),
            "DejaVuSans-Bold",
            ink,
        )
    elif kind == 1:
        for turn in (0, 180):
            draw.arc((line, line, side - line, side - line), turn + 15, turn + 150, fill=ink, width=line)
            angle = np.deg2rad(turn + 155)
            draw.regular_polygon(
                (middle + side * 0.36 * np.cos(angle), middle + side * 0.36 * np.sin(angle), line * 1.3),
                3,
                turn,
                fill=ink,
            )
    else:
        draw.polygon(
            [
                (side * 0.25, side * 0.25),
                (side * 0.75, side * 0.25),
                (side * 0.68, side * 0.85),
                (side * 0.32, side * 0.85),
            ],
            outline=ink,
            width=max(line // 2, 1),
        )
        draw.rectangle((side * 0.2, side * 0.15, side * 0.8, side * 0.25), fill=ink)
        draw.line((side * 0.08, side * 0.08, side * 0.92, side * 0.92), fill=ink, width=max(line // 2, 1))
        draw.line((side * 0.92, side * 0.08, side * 0.08, side * 0.92), fill=ink, width=max(line // 2, 1))
    return image


def arrow(draw, start, end, line, ink) -> None:
    """A thick arrow between two points."""
    draw.line((*start, *end), fill=ink, width=line)
    direction = np.subtract(end, start) / (np.hypot(*np.subtract(end, start)) + 1e-6)
    normal = np.array([-direction[1], direction[0]])
    tip, base = np.add(end, direction * line), np.subtract(end, direction * line * 0.5)
    draw.polygon([tuple(tip), tuple(base + normal * line * 1.2), tuple(base - normal * line * 1.2)], fill=ink)


def draw_price_table(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A grid that is no nutrition table: shop prices, cooking times, or an allergy matrix of dots."""
    width, height = size
    panel, ink = table_colors(rng, style)
    columns, rows = int(rng.integers(2, 6)), int(rng.integers(3, 7))
    image, draw = sheet(size, panel)
    kind, across, down = int(rng.integers(3)), width / columns, height / rows
    accent = style.accent if panel is None or abs(luminance(style.accent) - luminance(panel)) > 40 else ink
    draw.rectangle((0, 0, width, down), fill=accent)
    for row in range(rows):
        for column in range(columns):
            box = (column * across + 2, row * down, (column + 1) * across - 2, (row + 1) * down)
            price_cell(rng, draw, box, kind, ink_on(rng, accent) if row == 0 else ink, row == 0, column == 0)
    for x in range(columns + 1):
        draw.line(
            (min(x * across, width - 1), 0, min(x * across, width - 1), height),
            fill=ink,
            width=max(int(down * 0.06), 1),
        )
    for y in range(rows + 1):
        draw.line(
            (0, min(y * down, height - 1), width, min(y * down, height - 1)), fill=ink, width=max(int(down * 0.06), 1)
        )
    return image


def price_cell(rng, draw, box, kind, ink, head, first) -> None:
    """One cell of a price table, a cooking chart or an allergy matrix."""
    if head or first:
        return center_text(draw, box, made_up_word(rng, int(rng.integers(1, 4))), "DejaVuSans-Bold", ink)
    if kind == 0:
        text = f"{pick(rng, '€$£')}{rng.integers(0, 30)}.{rng.integers(0, 10)}9"
        return center_text(draw, box, text, "DejaVuSans-Bold", ink)
    if kind == 1:
        return center_text(draw, box, f"{rng.integers(1, 25)} {pick(rng, ('min', '°C', 'W'))}", "DejaVuSans", ink)
    radius, x, y = (box[3] - box[1]) * 0.25, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    draw.ellipse(
        (x - radius, y - radius, x + radius, y + radius), outline=ink, fill=ink if rng.random() < 0.4 else None
    )
    return None


# ---- what is printed but not labelled ------------------------------------------------------------------------------


def draw_text_block(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """Address, storage advice or a recipe: plain lines, no bold opening word."""
    width, height = size
    image, draw = sheet(size)
    words = [made_up_word(rng, int(rng.integers(1, 5))) for _ in range(30)] * 4
    text = " ".join(word.title() if rng.random() < 0.2 else word for word in words)
    text_size = max(int(min(height / rng.uniform(2, 8) / 1.18, width / 9)), 5)
    write_lines(draw, (0, 0, width, height), [(text, rng.random() < 0.15)], text_size, style.ink, style.face)
    return image


def draw_badge(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A ribbon or a pill with a short claim."""
    width, height = size
    color = vivid(rng)
    image, draw = sheet(size)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), height * rng.uniform(0, 0.5), fill=color)
    text = pick(
        rng,
        (
            "BIO",
            "NEW!",
            "-20%",
            "VEGAN",
            "500 g e",
            "100% natural",
            "ORGANIC",
            "0% fat",
            "Nouveau",
            "XXL",
            "GLUTEN FREE",
        ),
    )
    center_text(draw, (width * 0.08, 0, width * 0.92, height), text, "DejaVuSans-Bold", ink_on(rng, color))
    return image


def draw_food_picture(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """A photograph of food, seen from far: warm blotches and shaded round things in an oval or a rectangle."""
    width, height = size
    base = np.array(
        pick(rng, ((150, 90, 40), (200, 150, 80), (180, 60, 40), (110, 130, 50), (90, 50, 30), (230, 200, 150)))
    )
    noise = np.clip(base + rng.normal(0, 40, (5, 5, 1)) + rng.normal(0, 15, (5, 5, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.BICUBIC).convert("RGBA")
    draw = ImageDraw.Draw(image)
    radius = min(size) * rng.uniform(0.08, 0.25)
    for _ in range(int(rng.integers(0, 25))):
        color = tuple(int(v) for v in np.clip(base + rng.normal(0, 35, 3), 0, 255))
        ball(draw, rng.uniform(0, width), rng.uniform(0, height), radius * rng.uniform(0.6, 1.2), color)
    mask = Image.new("L", size, 0)
    shape = pick(rng, (ImageDraw.ImageDraw.ellipse, ImageDraw.ImageDraw.rectangle, ImageDraw.ImageDraw.ellipse))
    shape(ImageDraw.Draw(mask), (0, 0, width - 1, height - 1), fill=255)
    image.putalpha(mask)
    return image


def ball(draw, x, y, radius, color) -> None:
    """A shaded round thing: three discs, each smaller, lighter and nearer the light."""
    for step, share in enumerate((0.0, 0.15, 0.35)):
        r = radius * (1 - 0.3 * step)
        cx, cy = x - radius * 0.12 * step, y - radius * 0.12 * step
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=mix(mix(color, BLACK, 0.25), WHITE, share))
