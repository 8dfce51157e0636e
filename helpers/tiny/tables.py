"""Tables of a package: nutrition tables in the layouts of the world, and the price table that is none of them."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from PIL import Image

from helpers.tiny.colors import BLACK, WHITE, Panel, contrast, ink_on, mix, vivid
from helpers.tiny.printing import SANS, Box, Sheet, Size, Style, font, natural_width, pick, round_corners
from helpers.tiny.texts import LANGUAGES, WORDS, amount, energy, made_up_word

Rows = list[list[str]]  # cells, the head row first
Fact = tuple[str, str, bool]  # a row in North America: label with its amount, percentage, bold
TITLE_HEIGHT = 1.5  # rows
BAR_INSET, TEXT_INSET = 0.3, 0.4  # margins of bars and texts in North America, in heights of a row


def draw_nutrition_table(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A nutrition table of a layout that suits the aspect of `size`."""
    aspect, chance = size[0] / size[1], rng.random()
    layout = draw_grid
    if aspect > 3:
        layout = pick(rng, (draw_linear, draw_strip, draw_tabular))
    elif aspect > 1.7 and chance < 0.45:
        layout = pick(rng, (draw_linear, draw_strip, draw_tabular, draw_tabular))
    elif aspect < 1 and chance < 0.32:
        layout = draw_facts
    elif aspect > 1.1 and chance > 0.95:
        layout = draw_linear
    return layout(rng, size, style)


def table_colors(rng: Generator, style: Style) -> Panel:
    """Panel (None: printed directly on the artwork) and ink."""
    chance = rng.random()
    if chance < 0.42:
        return None, style.ink
    panel = WHITE if chance < 0.8 else vivid(rng) if chance < 0.88 else mix(style.paper, WHITE, 0.6)
    panel = BLACK if chance > 0.96 else panel
    return panel, ink_on(rng, panel)


def draw_title(rng: Generator, sheet: Sheet, height: float, title: str) -> None:
    """The title line of a table, plain or on a bar of the brand's colour."""
    width, face = sheet.width, sheet.style.bold
    title = title.upper() if rng.random() < 0.4 else title
    if rng.random() < 0.3:
        branded = rng.random() < 0.6 or sheet.panel is None
        bar = sheet.style.accent if branded else mix(sheet.panel, sheet.ink, 0.85)
        sheet.draw.rectangle((0, 0, width, height * 0.92), fill=bar)
        sheet = sheet.with_ink(ink_on(rng, bar))
    largest = height * rng.uniform(0.5, 0.85)
    if rng.random() < 0.5:
        sheet.center_text((width * 0.03, 0, width * 0.97, height * 0.92), title, face, largest)
    else:
        used = sheet.font(min(largest, width * 0.95 / natural_width(title, face)), bold=True)
        sheet.draw.text((height * 0.15, height * 0.45), title, sheet.ink, used, "lm")


def row_labels(rng: Generator, language: str) -> list[str]:
    """The eight EU rows, in one language or several divided by a slash."""
    chance = rng.random()
    others = [pick(rng, LANGUAGES) for _ in range(0 if chance < 0.65 else 1 if chance < 0.85 else 2)]
    columns = [WORDS["languages"][code]["rows"] for code in (language, *others)]
    return [" / ".join(dict.fromkeys(labels)) for labels in zip(*columns, strict=True)]


def eu_content(rng: Generator, style: Style, count: int, columns: int) -> tuple[str, Rows]:
    """Title and rows of a per-100 g table with about `count` rows and `columns` columns of numbers."""
    words, comma = WORDS["languages"][style.language], rng.random() < 0.7
    labels = row_labels(rng, style.language)
    if count < 8:
        labels = [labels[i] for i in (0, 1, 3, 6, 7, 4, 2)[: max(count - 1, 3)]]
    labels += [pick(rng, WORDS["vitamins"]) for _ in range(max(count - 9, 0))]
    unit, form = pick(rng, (" g", "g", " g", "")), pick(rng, range(4) if columns > 1 else (0, 3))
    heads = [words["per"], f"{rng.integers(15, 330)} {pick(rng, ('g', 'ml'))}", "% RI*", "% *"]
    rows = [[pick(rng, ("", words["title"])), *heads[:columns]]]
    for index, label in enumerate(labels):
        cells = [energy(rng, form) if index == 0 else amount(rng, comma, unit) for _ in range(columns)]
        rows.append([label, *cells[:2], *(f"{rng.integers(0, 60)} %" for _ in cells[2:])])
    return words["title"], rows


def world_content(rng: Generator, style: Style, count: int, columns: int) -> tuple[str, Rows]:
    """Title and rows of a table as printed in Australia, Brazil, India, Mexico."""
    words = pick(rng, tuple(WORDS["world"].values()))
    heads = words["columns"][:columns]
    rows = [["", *heads]]
    for label in words["rows"][: max(count - 1, 4)]:
        rows.append([label, *(amount(rng, False, pick(rng, ("g", "", " mg"))) for _ in heads)])
    return words["title"], rows


@dataclass(frozen=True)
class Grid:
    """What stands in a table and where."""

    rows: Rows
    widths: list[float]  # of the columns, pixels
    top: float  # y of the first row
    row_height: float
    text_size: int


def draw_grid(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A table of rows and columns as on most packages: head, rows, number columns, with many decorations."""
    width, height = size
    title, rows = grid_content(rng, size, style)
    panel, ink = table_colors(rng, style)
    titled = rng.random() < 0.55
    row_height = height / (len(rows) + (TITLE_HEIGHT if titled else 0))
    text_size = int(np.clip(row_height * rng.uniform(0.6, 0.86), 5, 60))
    widths = column_widths(rows, style.bold, text_size)
    if sum(widths) > width:  # long labels: smaller print, and the rest is left to `fit`, which condenses
        text_size = max(int(text_size * max((width / sum(widths)) ** 0.85, 0.42)), 5)
        widths = column_widths(rows, style.bold, text_size)
    widths = spread(rng, widths, width)
    top = TITLE_HEIGHT * row_height if titled else 0
    sheet = Sheet((sum(widths) + text_size * 0.5, height), style, panel, ink)
    grid = Grid(rows, widths, top, row_height, text_size)
    if titled:
        draw_title(rng, sheet, top, title)
    decorate_grid(rng, sheet, grid)
    write_cells(rng, sheet, grid)
    rounded = panel and rng.random() < 0.25
    return round_corners(sheet.image, min(sheet.image.size) * rng.uniform(0.03, 0.12)) if rounded else sheet.image


def grid_content(rng: Generator, size: Size, style: Style) -> tuple[str, Rows]:
    """Title and rows of a table: as many as suit the aspect of `size`."""
    width, height = size
    count = int(np.clip(rng.normal(9 if height > 0.6 * width else 7.5, 2), 4, 8 + 8 * height / width))
    columns = int(rng.choice([1, 2, 3, 4], p=[0.42, 0.33, 0.17, 0.08])) if width > 0.6 * height else 1
    content = eu_content if rng.random() < 0.8 else world_content
    return content(rng, style, count, columns)


def column_widths(rows: Rows, face: str, size: int) -> list[float]:
    """Natural width of each column at a font size, with the gap after it."""
    measure = font(face, size).getlength
    return [max(measure(cell) for cell in column) + size * 0.9 for column in zip(*rows, strict=True)]


def spread(rng: Generator, widths: list[float], width: float) -> list[float]:
    """Share out the spare width: to the label column, or to all columns alike."""
    spare = max(width - sum(widths), 0)
    if rng.random() < 0.5:
        return [widths[0] + spare, *widths[1:]]
    return [value + spare / len(widths) for value in widths]


def decorate_grid(rng: Generator, sheet: Sheet, grid: Grid) -> None:
    """Zebra rows, a head bar, rules between rows and columns, a frame: each or none."""
    draw, count, top, right, bottom = sheet.draw, len(grid.rows), grid.top, sheet.width - 1, sheet.height - 1
    step = (bottom - top) / count
    line = max(int(step * rng.uniform(0.02, 0.1)), 1)
    paper = sheet.panel or mix(sheet.ink, (128, 128, 128), 0.7)
    rule = mix(paper, sheet.ink, rng.uniform(0.3, 1.0))
    if rng.random() < 0.22:
        shade = mix(paper, sheet.style.accent if rng.random() < 0.6 else sheet.ink, rng.uniform(0.1, 0.35))
        for row in range(int(rng.integers(2)), count, 2):
            draw.rectangle((0, top + row * step, right, top + (row + 1) * step), fill=shade)
    if rng.random() < 0.25:
        draw.rectangle((0, top, right, top + step), fill=mix(paper, sheet.style.accent, rng.uniform(0.3, 0.7)))
    if rng.random() < 0.62:
        for row in range(1, count):
            draw.line((0, top + row * step, right, top + row * step), fill=rule, width=line)
    if rng.random() < 0.35:
        for x in np.cumsum(grid.widths)[:-1]:
            draw.line((x, top, x, bottom), fill=rule, width=line)
    if rng.random() < 0.5:
        draw.rectangle((0, 0 if rng.random() < 0.5 else top, right, bottom), outline=rule, width=line + 1)


def write_cells(rng: Generator, sheet: Sheet, grid: Grid) -> None:
    """Labels to the left (sub-rows indented), numbers to the right or in the middle of their columns."""
    bold_all, bold_labels, centered = rng.random() < 0.2, rng.random() < 0.25, rng.random() < 0.35
    size, ends = grid.text_size, np.cumsum(grid.widths)
    places = ends - np.array(grid.widths) / 2 if centered else ends - size * 0.3
    plain, bold = sheet.font(size), sheet.font(size, bold=True)
    for index, (label, *numbers) in enumerate(grid.rows):
        y = grid.top + (index + 0.5) * grid.row_height
        heavy = bold_all or index == 0 or (index == 1 and bold_labels)
        indent = size * (0.8 if index in (3, 5) and len(grid.rows) > 7 else 0.3)
        sheet.draw.text((indent, y), label, sheet.ink, bold if heavy or bold_labels else plain, "lm")
        for x, number in zip(places[1:], numbers, strict=True):
            sheet.draw.text((x, y), number, sheet.ink, bold if heavy else plain, "mm" if centered else "rm")


def facts_rows(rng: Generator, words: dict) -> list[Fact]:
    """Rows of a North American table."""
    rows = []
    for label in words["rows"]:
        label = label.replace("_", str(rng.integers(1, 30)))
        bold = label.startswith(("Total F", "Chol", "Sod", "Total C", "Prot", "Fat", "Carb"))
        rows.append((f"{label} {rng.integers(0, 40)}{pick(rng, ('g', 'g', 'mg'))}", f"{rng.integers(0, 60)}%", bold))
    return rows


def facts_colors(rng: Generator, style: Style) -> Panel:
    """Panel and ink of a North American table: mostly black on white."""
    return (WHITE, BLACK) if rng.random() < 0.75 else table_colors(rng, style)


def draw_facts(rng: Generator, size: Size, style: Style) -> Image.Image:
    """The North American vertical table: heavy title, thick bars, the calories line, percentages, a footnote."""
    width, height = size
    words = WORDS["us"] if rng.random() < 0.7 else WORDS["ca"]
    colors = facts_colors(rng, style)
    rows, foot = facts_rows(rng, words), int(rng.integers(0, 4))
    vitamins = [(f"{name} {rng.integers(0, 300)}mg", f"{rng.integers(0, 30)}%", False) for name in words["vitamins"]]
    rows = rows[: len(rows) - int(rng.integers(0, 4))]
    unit = height / (6.6 + len(rows) + len(vitamins) + 0.75 * foot)
    natural = unit * 0.72 * 0.58 * max(len(row[0]) + 6 for row in rows)
    style = replace(style, face=SANS)  # the law prescribes the look of these tables, whatever the rest is printed in
    sheet = Sheet((max(width, natural), height), style, *colors)
    facts_head(rng, sheet, unit, words["title"])
    y = facts_body(sheet, unit, unit * 6.1, rows)
    facts_bar(sheet, unit, y, y + unit * 0.4)
    y = facts_body(sheet, unit, y + unit * 0.5, vitamins)
    facts_bar(sheet, unit, y, y + unit * 0.2)
    if foot:
        box = (unit * TEXT_INSET, y + unit * 0.3, sheet.width - unit * BAR_INSET, height - unit * 0.2)
        sheet.write_lines(box, [(words["foot"], False)], int(unit * 0.55))
    if rng.random() < 0.85:
        sheet.frame(unit * 0.13)
    return sheet.image


def facts_bar(sheet: Sheet, unit: float, top: float, bottom: float) -> None:
    """A thick bar across a North American table."""
    sheet.draw.rectangle((unit * BAR_INSET, top, sheet.width - unit * BAR_INSET, bottom), fill=sheet.ink)


def facts_head(rng: Generator, sheet: Sheet, unit: float, title: str) -> None:
    """Title, serving lines, thick bar and calories of a North American table: the upper 6.1 units."""
    left, right, ink = unit * TEXT_INSET, sheet.width - unit * TEXT_INSET, sheet.ink
    large, heavy = sheet.font(unit * 1.35, bold=True), sheet.font(unit * 0.75, bold=True)
    title = title if rng.random() < 0.5 else title.split(" / ")[0]
    sheet.center_text((unit * BAR_INSET, 0, sheet.width - unit * BAR_INSET, unit * 1.9), title)
    servings = f"{rng.integers(2, 20)} servings per container"
    sheet.draw.text((left, unit * 2.2), servings, ink, sheet.font(unit * 0.7), "lm")
    sheet.draw.text((left, unit * 3.1), "Serving size", ink, heavy, "lm")
    sheet.draw.text((right, unit * 3.1), f"{rng.integers(15, 300)}g", ink, heavy, "rm")
    facts_bar(sheet, unit, unit * 3.6, unit * 4.15)
    sheet.draw.text((left, unit * 5), "Calories", ink, large, "lm")
    sheet.draw.text((right, unit * 5), f"{rng.integers(3, 60) * 10}", ink, large, "rm")
    facts_bar(sheet, unit, unit * 5.75, unit * 6)


def facts_body(sheet: Sheet, unit: float, y: float, rows: list[Fact]) -> float:
    """Ruled rows with a percentage to the right; the y below."""
    draw, ink, width = sheet.draw, sheet.ink, sheet.width
    plain, heavy = sheet.font(unit * 0.72), sheet.font(unit * 0.72, bold=True)
    for label, percent, bold in rows:
        draw.text((unit * (TEXT_INSET if bold else 1.1), y + unit * 0.5), label, ink, heavy if bold else plain, "lm")
        draw.text((width - unit * TEXT_INSET, y + unit * 0.5), percent, ink, heavy, "rm")
        y += unit
        draw.line((unit * BAR_INSET, y, width - unit * BAR_INSET, y), fill=ink, width=max(int(unit * 0.07), 1))
    return y


def draw_tabular(rng: Generator, size: Size, style: Style) -> Image.Image:
    """The wide North American table: title block to the left, two blocks of rows beside it."""
    width, height = size
    colors = facts_colors(rng, style)
    rows, per_block = facts_rows(rng, WORDS["us"]), int(rng.integers(4, 6))
    unit = height / (per_block + 1.3)
    block = max(width * 0.36, unit * 0.7 * 0.58 * 30)
    sheet, left = Sheet((block * 2.8, height), style, *colors), block * 0.8
    tabular_head(rng, sheet, unit, left)
    for index in range(2):
        part, x = Sheet((block, height), replace(style, face=SANS), *colors), left + block * index
        facts_body(part, unit, unit * 0.8, rows[index * per_block : (index + 1) * per_block])
        sheet.image.paste(part.image, (int(x), 0))
        inset = unit * BAR_INSET
        sheet.draw.rectangle((x + inset, inset, x + block - inset, unit * 0.6), fill=sheet.ink)
    if rng.random() < 0.85:
        sheet.frame(unit * 0.13)
    return sheet.image


def tabular_head(rng: Generator, sheet: Sheet, unit: float, width: float) -> None:
    """Title, serving line and calories, one below the other in the left `width` pixels."""
    left, right, height = unit * 0.2, width - unit * 0.2, sheet.height
    title = ("Nutrition", "Facts") if rng.random() < 0.6 else ("Valeur", "nutritive")
    for line, text in enumerate(title):
        sheet.center_text((left, height * 0.24 * line, right, height * 0.24 * (line + 1)), text)
    serving = f"Serv. size {rng.integers(15, 300)}g"
    sheet.draw.text((unit * 0.3, height * 0.58), serving, sheet.ink, sheet.font(unit * 0.6), "lm")
    sheet.center_text((left, height * 0.68, right, height * 0.95), f"Calories {rng.integers(3, 60) * 10}")


def draw_linear(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A table without columns: one paragraph of nutrients, opened by its title."""
    width, height = size
    words = WORDS["languages"][style.language]
    sheet = Sheet(size, style, *table_colors(rng, style))
    lines = float(np.clip(height / width * 14, 2, 12))
    text_size = max(int(height / lines / 1.3), 5)
    runs = [(words["title"] + " " + words["per"] + ":", True)]
    comma = rng.random() < 0.6
    for _ in range(4):
        for index, label in enumerate(words["rows"]):
            runs.append((label, rng.random() < 0.2))
            runs.append((energy(rng, 0) + ";" if index == 0 else amount(rng, comma) + ",", False))
    sheet.write_lines(sheet.inside(text_size * 0.35), runs, text_size)
    if rng.random() < 0.55:
        sheet.frame(text_size // 9)
    return sheet.image


def draw_strip(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A table that lies on its side: one column per nutrient, values below the names."""
    width, height = size
    colors = table_colors(rng, style)
    title, rows = eu_content(rng, style, int(rng.integers(5, 9)), int(rng.integers(1, 3)))
    names, *values = zip(*rows[1:], strict=True)
    lines = [[name.split(" / ")[0] for name in names], *values]
    titled = rng.random() < 0.6
    first = 1 if titled else 0
    step = height / (first + len(lines))
    sheet = Sheet((max(width, step * 1.7 * len(names)), height), style, *colors)
    column = sheet.width / len(names)
    for row, cells in enumerate(lines, start=first):
        face = style.bold if row == first else style.face
        for index, cell in enumerate(cells):
            box = (index * column + 2, row * step, (index + 1) * column - 2, (row + 1) * step)
            sheet.center_text(box, cell, face, step * 0.5)
    if titled:
        draw_title(rng, sheet, step, title)
    decorate_strip(rng, sheet, len(names), first + len(lines))
    return sheet.image


def decorate_strip(rng: Generator, sheet: Sheet, columns: int, lines: int) -> None:
    """Rules and frame of a table on its side."""
    draw, ink, width, height = sheet.draw, sheet.ink, sheet.width, sheet.height
    line = max(int(height / lines * 0.05), 1)
    if rng.random() < 0.7:
        for row in range(1, lines):
            draw.line((0, row * height / lines, width, row * height / lines), fill=ink, width=line)
    if rng.random() < 0.6:
        for x in (column * width / columns for column in range(1, columns)):
            draw.line((x, height / lines, x, height), fill=ink, width=line)
    if rng.random() < 0.7:
        sheet.frame(line)


def draw_price_table(rng: Generator, size: Size, style: Style) -> Image.Image:
    """A grid that is no nutrition table: shop prices, cooking times, or an allergy matrix of dots."""
    width, height = size
    sheet = Sheet(size, style, *table_colors(rng, style))
    columns, rows, kind = int(rng.integers(2, 6)), int(rng.integers(3, 7)), pick(rng, ("price", "time", "dot"))
    across, down = width / columns, height / rows
    accent = style.accent if not sheet.panel or contrast(style.accent, sheet.panel) > 40 else sheet.ink
    sheet.draw.rectangle((0, 0, width, down), fill=accent)
    for row in range(rows):
        for column in range(columns):
            box = (column * across + 2, row * down, (column + 1) * across - 2, (row + 1) * down)
            used = sheet if row else sheet.with_ink(ink_on(rng, accent))
            fill_cell(rng, used, box, kind if row and column else "name")
    line = max(int(down * 0.06), 1)
    for x in (min(column * across, width - 1) for column in range(columns + 1)):
        sheet.draw.line((x, 0, x, height), fill=sheet.ink, width=line)
    for y in (min(row * down, height - 1) for row in range(rows + 1)):
        sheet.draw.line((0, y, width, y), fill=sheet.ink, width=line)
    return sheet.image


def fill_cell(rng: Generator, sheet: Sheet, box: Box, kind: str) -> None:
    """One cell: a name, a price, a cooking time, or a circle of an allergy matrix, filled or not."""
    x1, y1, x2, y2 = box
    if kind == "name":
        sheet.center_text(box, made_up_word(rng, int(rng.integers(1, 4))))
    elif kind == "price":
        sheet.center_text(box, f"{pick(rng, '€$£')}{rng.integers(0, 30)}.{rng.integers(0, 10)}9")
    elif kind == "time":
        sheet.center_text(box, f"{rng.integers(1, 25)} {pick(rng, ('min', '°C', 'W'))}", SANS)
    else:
        radius, x, y = (y2 - y1) * 0.25, (x1 + x2) / 2, (y1 + y2) / 2
        fill = sheet.ink if rng.random() < 0.4 else None
        sheet.draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=sheet.ink, fill=fill)
