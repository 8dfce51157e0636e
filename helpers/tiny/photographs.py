"""Turns a flat printed label into something like a phone's photograph of a package.

Coordinates: *picture* pixels are those of the photograph, *label* pixels those of the flat label. `to_label` maps the
first to the second (the direction that resampling needs); a `View` holds all that this map depends on.
"""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from helpers.tiny.drawings import BLACK, WHITE, Style, draw_food_picture, mix, pick, vivid

Size = tuple[int, int]
GRID = 28  # pixels between the nodes of the warp; divides every picture size


@dataclass(frozen=True)
class View:
    """How the camera sees the label."""

    label_size: Size  # pixels
    center: tuple[float, float]  # where the label's centre lies in the picture, pixels
    angle: float  # rotation in the picture, radians
    tilt: tuple[float, float]  # perspective: change of scale per pixel to the right and down
    radius: float  # of the cylinder that the label is wrapped around, pixels; 0 for flat
    waves: np.ndarray  # creases [n, 4]: wave numbers across and down, phase, displacement in pixels
    kind: str  # "fill" (the label is larger than the picture) or a body: box, bag, bottle, jar, tray


# ---- geometry ------------------------------------------------------------------------------------------------------


def choose_view(rng: np.random.Generator, size: Size, tables: list[tuple[float, float]]) -> View:
    """A view that leaves room for tables of the wanted extents (pixels of the picture)."""
    width, height = max(w for w, _ in tables) * 1.15, max(h for _, h in tables) * 1.15
    fills = rng.random() < 0.55 or width > 0.75 * size[0] or height > 0.7 * size[1] or len(tables) > 1
    kind = "fill" if fills else pick(rng, ("box", "box", "bag", "bottle", "jar", "tray"))
    if fills:
        label_size = tuple(int(size[k] * rng.uniform(1.1, 1.5)) for k in (0, 1))
    else:
        label_size = tuple(int(rng.uniform(max(0.5 * size[k], (width, height)[k]), 0.92 * size[k])) for k in (0, 1))
    calm = (
        0.35 if width > 0.8 * size[0] or height > 0.8 * size[1] else 1.0
    )  # who fills the frame holds the phone straight
    angle = calm * np.deg2rad(np.clip(rng.normal(0, 5) if rng.random() < 0.8 else rng.uniform(-20, 20), -20, 20))
    curved = rng.random() < 0.25 if fills else kind in ("bottle", "jar")
    radius = max(label_size[0] * rng.uniform(0.34, 0.6), 0.62 * width) if curved else 0.0
    spare = [abs(label_size[k] - size[k]) / 2 for k in (0, 1)]
    center = tuple(size[k] / 2 + rng.uniform(-0.8, 0.8) * spare[k] * (0.5 if curved else 1) for k in (0, 1))
    tilt = tuple(rng.normal(0, 0.16 if rng.random() < 0.5 else 0.05, 2).clip(-0.35, 0.35) / max(size))
    return View(label_size, center, float(angle), tilt, radius, choose_waves(rng, kind), kind)


def choose_waves(rng: np.random.Generator, kind: str) -> np.ndarray:
    """Creases: none on boxes and glass, some on most other things, strong ones on bags."""
    strength = rng.choice([0, 0, 0.6, 1.5]) if kind == "fill" else {"bag": 1.3, "tray": 0.4}.get(kind, 0)
    count = int(rng.integers(3, 8)) if strength else 0
    length, direction = rng.uniform(35, 220, count), rng.uniform(0, 2 * np.pi, count)
    shift = strength * rng.uniform(0.3, 1, count) * length / 40
    numbers = 2 * np.pi / length
    return np.stack([numbers * np.cos(direction), numbers * np.sin(direction), rng.uniform(0, 6.3, count), shift], 1)


def before_wrapping(view: View, points: np.ndarray) -> np.ndarray:
    """Picture points [n, 2] relative to the label's centre, with rotation and perspective undone."""
    relative = points - np.array(view.center)
    cos, sin = np.cos(view.angle), np.sin(view.angle)
    turned = relative @ np.array([[cos, -sin], [sin, cos]])
    return turned / np.clip(1 + turned @ np.array(view.tilt), 0.3, 3)[:, None]


def to_label(view: View, points: np.ndarray) -> np.ndarray:
    """Label coordinates [n, 2] of picture points [n, 2]; points beside the package get coordinates off the label."""
    flat = before_wrapping(view, points)
    if view.radius:
        share = flat[:, 0] / view.radius
        inside = np.clip(share, -1, 1)
        # seen slightly from above or below, the rows of a cylinder are arcs
        flat[:, 1] += view.radius * 0.25 * np.sign(view.tilt[1]) * (1 - np.sqrt(1 - inside**2))
        flat[:, 0] = view.radius * (np.arcsin(inside) + 3 * (share - inside))
    for across, down, phase, shift in view.waves:
        push = shift * np.sin(flat @ np.array([across, down]) + phase)
        flat = flat + push[:, None] * np.array([across, down]) / np.hypot(across, down)
    return flat + np.array(view.label_size) / 2


def hidden_cells(view: View, size: Size, cell: int) -> np.ndarray:
    """Which cells (of `cell` pixels) of the label the camera does not see well: bool [rows, columns]."""
    points = np.stack(np.meshgrid(np.arange(2, size[0], 4), np.arange(2, size[1], 4)), -1).reshape(-1, 2)
    cells = np.floor(to_label(view, points) / cell).astype(int)
    columns, rows = (view.label_size[k] // cell for k in (0, 1))
    inside = ((cells >= 0) & (cells < (columns, rows))).all(1)
    hidden = np.ones((rows, columns), bool)
    hidden[cells[inside, 1], cells[inside, 0]] = False
    hidden[[0, -1]] = hidden[:, [0, -1]] = True
    return hidden


def warp_mesh(view: View, size: Size, margin: tuple[int, int]) -> list:
    """The warp for `Image.transform`: rectangles of the picture, and where their corners lie on the body."""
    step = GRID // 2 if len(view.waves) else GRID  # creases are shorter than the curve of a bottle
    columns, rows = size[0] // step, size[1] // step
    nodes = np.stack(np.meshgrid(np.arange(columns + 1), np.arange(rows + 1)), -1) * step
    source = (to_label(view, nodes.reshape(-1, 2).astype(float)) + margin).reshape(rows + 1, columns + 1, 2)
    quads = np.concatenate([source[:-1, :-1], source[1:, :-1], source[1:, 1:], source[:-1, 1:]], -1).reshape(-1, 8)
    rectangles = np.concatenate([nodes[:-1, :-1], nodes[1:, 1:]], -1).reshape(-1, 4)
    return list(zip(map(tuple, rectangles.tolist()), map(tuple, quads.tolist()), strict=True))


# ---- surfaces and bodies -------------------------------------------------------------------------------------------


def smooth_noise(rng: np.random.Generator, size: Size, cells: Size) -> np.ndarray:
    """Smooth noise in -1..1, float32 [height, width], with about `cells` (across, down) bumps."""
    coarse = rng.uniform(-1, 1, (cells[1] + 1, cells[0] + 1)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.BICUBIC))


def gradient(first, second, size: Size, vertical: bool) -> Image.Image:
    """A linear run from one colour to another."""
    ramp = np.linspace(first, second, size[1] if vertical else size[0], dtype=np.float32).astype(np.uint8)
    ramp = ramp[:, None] if vertical else ramp[None]
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(ramp, (size[1], size[0], 3))))


def draw_surface(rng: np.random.Generator, size: Size, style: Style) -> Image.Image:
    """The empty label: paper, perhaps a gradient, blocks of colour, swooshes, a pattern, pictures of food."""
    image = gradient(
        style.paper, mix(style.paper, pick(rng, (BLACK, WHITE, style.paper)), 0.25), size, rng.random() < 0.6
    )
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:
        for _ in range(int(rng.integers(1, 4))):
            colored_shape(rng, draw, size, pick(rng, (style.accent, vivid(rng), mix(style.paper, style.accent, 0.3))))
    if rng.random() < 0.2:
        pattern(rng, draw, size, mix(style.paper, style.accent, rng.uniform(0.1, 0.4)))
    for _ in range(int(rng.choice([0, 1, 2], p=[0.6, 0.25, 0.15]))):
        part = tuple(int(side * rng.uniform(0.2, 0.6)) for side in size)
        food = draw_food_picture(rng, part, style)
        image.paste(food, tuple(int(rng.uniform(-0.2, 0.9) * side) for side in size), food)
    return image


def colored_shape(rng, draw, size, color) -> None:
    """A block along an edge, a large ellipse that runs out of the label, or a slanted band."""
    width, height = size
    kind, cut = int(rng.integers(4)), rng.uniform(0.08, 0.5)
    if kind == 0:
        draw.rectangle(
            (0, 0, width, height * cut) if rng.random() < 0.5 else (0, height * (1 - cut), width, height), fill=color
        )
    elif kind == 1:
        draw.rectangle(
            (0, 0, width * cut, height) if rng.random() < 0.5 else (width * (1 - cut), 0, width, height), fill=color
        )
    elif kind == 2:
        x, y, reach = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.2, 0.8) * width
        draw.ellipse((x - reach, y - reach * 0.6, x + reach, y + reach * 0.6), fill=color)
    else:
        y, slope, thick = rng.uniform(0, height), rng.uniform(-0.4, 0.4) * height, rng.uniform(0.05, 0.2) * height
        draw.polygon([(0, y), (width, y + slope), (width, y + slope + thick), (0, y + thick)], fill=color)


def pattern(rng, draw, size, color) -> None:
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


def wrap_body(rng, label: Image.Image, view: View, style: Style) -> tuple[Image.Image, tuple[int, int]]:
    """The package that carries the label, RGBA, and the margin (x, y) at which the label lies on it."""
    width, height = label.size
    if view.kind == "bottle":
        return bottle(rng, label, style)
    if view.kind == "jar":
        return jar(rng, label, style)
    body = label.convert("RGBA")
    if view.kind == "bag":
        body.putalpha(bag_outline(rng, label.size))
        crimp(rng, body)
    elif view.kind == "tray":
        mask = Image.new("L", label.size, 0)
        radius = min(label.size) * rng.uniform(0.05, 0.25)
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, width - 1, height - 1), radius, fill=255)
        body.putalpha(mask)
    elif view.kind == "box":
        return box_with_side(rng, body, style)
    return body, (0, 0)


def box_with_side(rng, body: Image.Image, style: Style) -> tuple[Image.Image, tuple[int, int]]:
    """A carton of which a darker neighbouring face is seen to one side."""
    depth = int(body.width * rng.uniform(0, 0.18))
    canvas = Image.new("RGBA", (body.width + 2 * depth, body.height), (0, 0, 0, 0))
    face = (*mix(style.paper, BLACK, rng.uniform(0.1, 0.5)), 255)
    left = rng.random() < 0.5
    canvas.paste(face, (0, 0, depth, body.height) if left else (depth + body.width, 0, canvas.width, body.height))
    canvas.paste(body, (depth, 0))
    return canvas, (depth, 0)


def bag_outline(rng, size: Size) -> Image.Image:
    """The wavy silhouette of a bag."""
    width, height = size
    steps = np.linspace(0, 1, 40)
    sides = [width * (0.012 + 0.012 * np.sin(steps * rng.uniform(4, 14) + rng.uniform(0, 6))) for _ in range(2)]
    left = list(zip(sides[0], steps * height, strict=True))
    right = list(zip(width - sides[1], steps * height, strict=True))
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).polygon(left + right[::-1], fill=255)
    return mask


def crimp(rng, body: Image.Image) -> None:
    """The pressed seams at the top and the bottom of a bag."""
    draw, deep = ImageDraw.Draw(body, "RGBA"), int(body.height * rng.uniform(0.02, 0.06))
    for x in range(0, body.width, 5):
        draw.line((x, 0, x, deep), fill=(255, 255, 255, 70), width=2)
        draw.line((x + 2, body.height - deep, x + 2, body.height), fill=(0, 0, 0, 60), width=2)


def bottle(rng, label: Image.Image, style: Style) -> tuple[Image.Image, tuple[int, int]]:
    """A bottle: glass or plastic above and below its label, shoulders, neck and cap."""
    width, height = label.size
    above, below = int(height * rng.uniform(0.4, 0.8)), int(height * rng.uniform(0.1, 0.5))
    glass = pick(rng, ((30, 70, 40), (90, 50, 20), (225, 235, 235), vivid(rng), (60, 30, 20), style.paper))
    canvas = Image.new("RGBA", (width, above + height + below), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    neck = width * rng.uniform(0.12, 0.3)
    draw.rectangle((width / 2 - neck, 0, width / 2 + neck, above), fill=(*glass, 255))
    draw.rectangle((width / 2 - neck * 1.1, 0, width / 2 + neck * 1.1, above * 0.25), fill=(*style.accent, 255))
    draw.ellipse((0, above * 0.35, width, above * 1.3), fill=(*glass, 255))
    draw.rectangle((0, above * 0.8, width, canvas.height), fill=(*glass, 255))
    canvas.paste(label, (0, above))
    return canvas, (0, above)


def jar(rng, label: Image.Image, style: Style) -> tuple[Image.Image, tuple[int, int]]:
    """A jar, a cup or a can: a lid and a rim of contents or metal around the label."""
    width, height = label.size
    above, below = int(height * rng.uniform(0.1, 0.3)), int(height * rng.uniform(0.02, 0.25))
    content = pick(rng, ((120, 30, 20), (200, 150, 60), (190, 190, 195), (60, 30, 15), (235, 230, 220), style.accent))
    canvas = Image.new("RGBA", (width, above + height + below), (*content, 255))
    lid = pick(rng, (WHITE, style.accent, (180, 180, 185), (200, 160, 60), (180, 30, 30)))
    ImageDraw.Draw(canvas).rectangle((0, 0, width, above * 0.7), fill=(*lid, 255))
    canvas.paste(label, (0, above))
    return canvas, (0, above)


# ---- what is behind the package ------------------------------------------------------------------------------------


def draw_background(rng: np.random.Generator, size: Size) -> Image.Image:
    """A shelf, a table, tiles, a wall, a floor or clutter, out of focus more often than not."""
    half = (size[0] // 2, size[1] // 2)
    image = pick(rng, (shelf, wood, tiles, wall, floor, clutter, wood, wall))(rng, half)
    blur = rng.uniform(0, 4) if rng.random() < 0.8 else 0
    return image.filter(ImageFilter.GaussianBlur(blur)).resize(size, Image.BILINEAR)


def shelf(rng, size: Size) -> Image.Image:
    """Rows of neighbouring packages above boards with price tags."""
    image = Image.new("RGB", size, mix((40, 40, 40), (120, 110, 100), rng.random()))
    draw, rows = ImageDraw.Draw(image), int(rng.integers(1, 4))
    for row in range(rows):
        base, tall, x = (row + 1) * size[1] / rows, size[1] / rows, -10.0
        while x < size[0]:
            wide, high = rng.uniform(0.12, 0.35) * size[0], tall * rng.uniform(0.55, 0.92)
            other_package(rng, draw, (x, base - high, x + wide, base))
            x += wide + rng.uniform(0, 4)
        draw.rectangle(
            (0, base - tall * 0.09, size[0], base), fill=pick(rng, ((220, 220, 220), (160, 160, 165), (190, 40, 30)))
        )
        for tag in rng.uniform(0, size[0], 3):
            draw.rectangle(
                (tag, base - tall * 0.085, tag + size[0] * 0.12, base - 2), fill=pick(rng, (WHITE, (250, 230, 80)))
            )
    return image


def other_package(rng, draw, box) -> None:
    """Another package, roughly: a block of colour with a band, a patch and some lines of text."""
    x1, y1, x2, y2 = box
    color = mix(vivid(rng) if rng.random() < 0.65 else WHITE, (95, 90, 85), rng.uniform(0.1, 0.7))
    draw.rectangle(box, fill=color)
    for _ in range(int(rng.integers(1, 4))):
        top = rng.uniform(y1, y2)
        draw.rectangle(
            (x1, top, x2, min(top + rng.uniform(0.05, 0.3) * (y2 - y1), y2)),
            fill=mix(vivid(rng), color, rng.uniform(0.2, 0.9)),
        )
    for y in np.arange(rng.uniform(y1, y2), y2 - 3, 4):
        draw.line((x1 + 4, y, x1 + rng.uniform(0.5, 0.95) * (x2 - x1), y), fill=mix(color, BLACK, 0.5))


def wood(rng, size: Size) -> Image.Image:
    """A table top: stretched noise in a wood tone, perhaps in boards."""
    tone = np.array(
        pick(rng, ((150, 105, 65), (205, 170, 120), (90, 60, 40), (225, 205, 175), (170, 140, 110))), np.float32
    )
    fine = smooth_noise(rng, size, (3, 60)) * rng.uniform(5, 18) + smooth_noise(rng, size, (2, 12)) * 12
    pixels = tone + fine[..., None] * np.array([1, 0.85, 0.7], np.float32)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        for y in range(int(rng.integers(10, 60)), size[1], int(rng.integers(30, 90))):
            ImageDraw.Draw(image).line((0, y, size[0], y), fill=mix(tuple(int(v) for v in tone), BLACK, 0.6))
    return image.transpose(Image.ROTATE_90).resize(size) if rng.random() < 0.4 else image


def tiles(rng, size: Size) -> Image.Image:
    """Wall or floor tiles with joints."""
    color = pick(rng, ((230, 230, 225), (180, 175, 165), (120, 125, 130), vivid(rng)))
    image, step = Image.new("RGB", size, color), int(rng.integers(25, 90))
    draw = ImageDraw.Draw(image)
    for y in range(int(rng.integers(step)), size[1], step):
        draw.line((0, y, size[0], y + int(rng.integers(-3, 4))), fill=mix(color, BLACK, 0.35), width=2)
    for x in range(int(rng.integers(step)), size[0], step):
        draw.line((x, 0, x, size[1]), fill=mix(color, BLACK, 0.35), width=2)
    return image


def wall(rng, size: Size) -> Image.Image:
    """A plain surface under uneven light."""
    color = mix((200, 195, 185), vivid(rng), float(rng.choice([0.05, 0.2, 0.8])))
    return gradient(color, mix(color, BLACK, rng.uniform(0.1, 0.6)), size, rng.random() < 0.5)


def floor(rng, size: Size) -> Image.Image:
    """Stone, cloth or carpet: grain of two scales."""
    tone = np.array(mix((130, 125, 120), vivid(rng), 0.3), np.float32)
    grain = (
        smooth_noise(rng, size, (size[0] // 3, size[1] // 3)) * rng.uniform(5, 35)
        + smooth_noise(rng, size, (6, 6)) * 20
    )
    return Image.fromarray(np.clip(tone + grain[..., None], 0, 255).astype(np.uint8))


def clutter(rng, size: Size) -> Image.Image:
    """A kitchen or a desk, undefined things of all colours."""
    image = wall(rng, size)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 16))):
        x, y = rng.uniform(-0.2, 1, 2) * size
        w, h = rng.uniform(0.08, 0.6, 2) * size
        shape = draw.ellipse if rng.random() < 0.35 else draw.rectangle
        shape((x, y, x + w, y + h), fill=mix(vivid(rng), (110, 105, 100), rng.uniform(0, 0.8)))
    return image


# ---- hands, light, camera ------------------------------------------------------------------------------------------


def draw_hand(rng: np.random.Generator, size: Size) -> Image.Image:
    """One to four fingers that reach in from an edge, RGBA."""
    canvas = Image.new("RGBA", (size[0] // 2, size[1] // 2), (0, 0, 0, 0))
    draw = ImageDraw.Draw(canvas)
    skin = mix(
        pick(rng, ((240, 205, 185), (228, 182, 155), (215, 165, 130), (165, 115, 80), (95, 62, 45))),
        (200, 140, 120),
        0.2,
    )
    width, height = canvas.size
    inward = rng.uniform(0, 2 * np.pi)
    direction = np.array([np.cos(inward), np.sin(inward)])
    normal = np.array([-direction[1], direction[0]])
    start = np.array([width, height]) * (0.5 - 0.62 * direction) + normal * rng.uniform(-0.3, 0.3) * min(width, height)
    thick, count = min(width, height) * rng.uniform(0.13, 0.26), int(rng.choice([1, 1, 2, 3, 4]))
    lean = rng.normal(0, 0.35)  # fingers rarely come in at a right angle
    direction = direction * np.cos(lean) + normal * np.sin(lean)
    for finger in range(count):
        aside = finger - (count - 1) / 2
        base = start + normal * aside * thick * 1.02 - direction * thick
        reach = thick + min(width, height) * rng.uniform(0.22, 0.5) * (1 - 0.12 * abs(aside))
        bend = direction + normal * aside * rng.uniform(-0.08, 0.1)
        one_finger(draw, base, base + bend * reach, thick * rng.uniform(0.9, 1.05), skin, normal, rng.random() < 0.5)
    return canvas.filter(ImageFilter.GaussianBlur(0.8)).resize(size, Image.BILINEAR)


def one_finger(draw, base, tip, thick, skin, normal, nail) -> None:
    """A shaded capsule that gets narrower: layers from dark and wide to light and narrow, shifted to the light."""
    along = (tip - base) / np.hypot(*(tip - base))
    for step in range(7):
        width = thick * (1 - 0.12 * step)
        color = mix(mix(skin, (70, 25, 15), 0.42 - 0.07 * step), WHITE, 0.02 * step)
        a, middle, b = (point + normal * thick * 0.03 * step for point in (base, (base + tip) / 2, tip))
        draw.line((*a, *middle), fill=(*color, 255), width=round(width * 1.12))
        for share in (0, 0.33, 0.66, 1):
            disc(draw, middle + (b - middle) * share, width * (1.12 - 0.16 * share), color)
        draw.line((*middle, *b), fill=(*color, 255), width=round(width))
    if nail:
        for share in (-0.12, 0, 0.12):
            disc(draw, tip + along * thick * (0.12 + share), thick * 0.5, mix(skin, (250, 215, 210), 0.5))


def disc(draw, center, width, color) -> None:
    """A filled circle of a diameter `width`."""
    draw.ellipse((*(center - width / 2), *(center + width / 2)), fill=(*color, 255))


def cast_shadow(picture: Image.Image, alpha: Image.Image, rng, strength: float) -> Image.Image:
    """Darken the picture beside and below what `alpha` covers."""
    small = alpha.resize((alpha.width // 4, alpha.height // 4)).filter(ImageFilter.GaussianBlur(rng.uniform(1, 4)))
    moved = Image.new("L", small.size, 0)
    moved.paste(small, (int(rng.integers(-4, 5)), int(rng.integers(0, 5))))
    shade = moved.resize(alpha.size, Image.BILINEAR).point(lambda value: int(value * strength))
    return Image.composite(Image.new("RGB", picture.size, (8, 8, 10)), picture, shade)


def shading(rng: np.random.Generator, view: View, size: Size) -> np.ndarray:
    """Brightness of the package by its form, float32 [height, width, 1]: round things are darker sideways."""
    columns, rows = size[0] // 7, size[1] // 7
    points = np.stack(np.meshgrid((np.arange(columns) + 0.5) * 7, (np.arange(rows) + 0.5) * 7), -1).reshape(-1, 2)
    flat, light = before_wrapping(view, points), rng.uniform(0, 2 * np.pi)
    gain = np.ones(len(points))
    if view.radius:
        share = np.clip(flat[:, 0] / view.radius, -1, 1)
        gain *= 0.4 + 0.65 * np.sqrt(1 - np.clip(share - 0.3 * np.cos(light), -1, 1) ** 2)
        gain += rng.uniform(0, 0.6) * np.exp(-(((share - rng.uniform(-0.6, 0.6)) / 0.07) ** 2))
    for across, down, phase, shift in view.waves:
        facing = (across * np.cos(light) + down * np.sin(light)) / np.hypot(across, down)
        slope = np.cos(flat @ np.array([across, down]) + phase)
        gain += 0.045 * shift * facing * slope + 0.02 * shift * np.clip(slope, 0, 1) ** 12
    return enlarge(gain.reshape(rows, columns), size)


def light_up(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Uneven light, vignette, glare and soft shadows on float32 pixels [height, width, 3] of 0..255."""
    height, width = pixels.shape[:2]
    y, x = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 32), indexing="ij")
    turn = rng.uniform(0, 2 * np.pi)
    gain = 1 + rng.uniform(0, 0.3) * (x * np.cos(turn) + y * np.sin(turn)) - rng.uniform(0, 0.15) * (x**2 + y**2)
    if rng.random() < 0.25:
        edge = x * np.cos(turn + 1) + y * np.sin(turn + 1) - rng.uniform(-0.7, 0.7)
        gain *= 1 - rng.uniform(0.2, 0.5) / (1 + np.exp(-edge * rng.uniform(5, 40)))
    pixels = pixels * enlarge(gain, (width, height))
    count = int(rng.choice([0, 1, 2, 3], p=[0.6, 0.25, 0.1, 0.05]))
    return pixels + enlarge(glare(rng, x, y, turn, count), (width, height)) if count else pixels


def glare(rng, x: np.ndarray, y: np.ndarray, turn: float, count: int) -> np.ndarray:
    """Reflections of lamps, as spots or streaks along the direction `turn`; x and y run from -1 to 1."""
    light = np.zeros_like(x)
    for _ in range(count):
        u, v = x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)
        along, aside = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
        narrow, long = rng.uniform(0.05, 0.25), rng.uniform(0.1, 0.9)
        light += rng.uniform(30, 220) * np.exp(-((aside / narrow) ** 2) - (along / long) ** 2)
    return light


def enlarge(coarse: np.ndarray, size: Size) -> np.ndarray:
    """A coarse map at the picture's size, float32 [height, width, 1]."""
    return np.asarray(Image.fromarray(coarse.astype(np.float32)).resize(size, Image.BILINEAR))[..., None]


def expose(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Automatic exposure (now and then too dark), colour temperature, saturation, contrast and gamma."""
    target = rng.uniform(45, 85) if rng.random() < 0.12 else rng.normal(138, 20)
    level = max(float(np.asarray(picture)[::8, ::8].mean()), 1.0)
    warmth, contrast = rng.normal(0.01, 0.05), rng.uniform(0.45, 0.7) if rng.random() < 0.1 else rng.uniform(0.8, 1.15)
    tint = np.array([1 + warmth, 1 + rng.normal(0, 0.02), 1 - 1.5 * warmth])
    gain = np.clip(target / level, 0.3, 1.9) ** 0.75 * contrast
    saturation = rng.uniform(0.5, 1.1)
    colors = (saturation * np.eye(3) + (1 - saturation) / 3) * (tint * gain)[:, None]
    offset = np.full((3, 1), 125 * (1 - contrast) + rng.uniform(-8, 14))
    picture = picture.convert("RGB", tuple(np.hstack([colors, offset]).ravel().tolist()))
    curve = (255 * (np.arange(256) / 255) ** rng.uniform(0.8, 1.15)).astype(int).tolist()
    return picture.point(curve * 3)


def through_camera(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Defocus or motion blur, loss of resolution, noise, JPEG."""
    size = picture.size
    chance = rng.random()
    if chance < 0.48:
        picture = picture.filter(ImageFilter.BoxBlur(rng.uniform(0.1, 1)))
    elif chance < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(1.2, 3)))
    elif chance < 0.7:
        kernel = np.eye(5) if rng.random() < 0.5 else np.outer([0, 0, 1, 0, 0], np.ones(5))
        kernel = kernel.T if rng.random() < 0.5 else kernel
        picture = picture.filter(ImageFilter.Kernel((5, 5), kernel.ravel().tolist()))
    if rng.random() < 0.2:
        share = rng.uniform(0.4, 0.8)
        picture = picture.resize((int(size[0] * share), int(size[1] * share)), Image.BILINEAR).resize(
            size, Image.BILINEAR
        )
    grain = rng.standard_normal((size[1], size[0], 1), np.float32) * rng.gamma(1.5, 2)
    pixels = np.clip(np.asarray(picture, np.float32) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(40, 96)))
    return Image.open(buffer).convert("RGB")


def without_covered(seen: np.ndarray, hand: np.ndarray) -> np.ndarray:
    """The mask of ids less those that a hand (bool [height, width]) hides by half or more; others stay whole."""
    areas, covered = np.bincount(seen.ravel(), minlength=256), np.bincount(seen[hand], minlength=256)
    return np.where(covered[seen] * 2 >= areas[seen], 0, seen).astype(np.uint8)


def photograph(rng, label, ids, view: View, size: Size, style: Style) -> tuple[Image.Image, np.ndarray]:
    """The picture (RGB, `size`), and the mask of ids warped as the label was, uint8 [height, width]."""
    body, margin = wrap_body(rng, label, view, style)
    package = body.transform(size, Image.MESH, warp_mesh(view, size, margin), Image.BILINEAR)
    seen = np.asarray(ids.transform(size, Image.MESH, warp_mesh(view, size, (0, 0)), Image.NEAREST))
    alpha = package.getchannel("A")
    picture = Image.new("RGB", size)
    if alpha.getextrema()[0] < 255:  # something of the background is seen
        picture = cast_shadow(draw_background(rng, size), alpha, rng, rng.uniform(0.2, 0.8))
    formed = np.asarray(package.convert("RGB"), np.float32) * shading(rng, view, size)
    picture.paste(Image.fromarray(np.clip(formed, 0, 255).astype(np.uint8)), (0, 0), alpha)
    if rng.random() < 0.22:
        hand = draw_hand(rng, size)
        picture = cast_shadow(picture, hand.getchannel("A"), rng, 0.5)
        picture.paste(hand, (0, 0), hand)
        seen = without_covered(seen, np.asarray(hand.getchannel("A")) > 128)
    lit = np.clip(light_up(rng, np.asarray(picture, np.float32)), 0, 255).astype(np.uint8)
    return through_camera(rng, expose(rng, Image.fromarray(lit))), seen
