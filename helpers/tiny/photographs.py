"""Turns a printed label into something like a phone's photograph of a package: body, light, hands, camera."""

import io

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from helpers.tiny.backgrounds import draw_background
from helpers.tiny.colors import BLACK, CLEAR, WHITE, Color, mix, vivid
from helpers.tiny.printing import Size, Style, as_picture, pick, round_corners
from helpers.tiny.surface import Surface
from helpers.tiny.views import View, before_wrapping, grid_points, warp_mesh

SKINS = ((240, 205, 185), (228, 182, 155), (215, 165, 130), (165, 115, 80), (95, 62, 45))
Body = tuple[Image.Image, tuple[int, int]]  # a package, RGBA, and the place (x, y) of the label on it
Finger = tuple[np.ndarray, np.ndarray]  # where it begins and its tip, [2] each


def photograph(surface: Surface, view: View) -> tuple[Image.Image, np.ndarray]:
    """The picture (RGB), and the mask of ids warped as the label was, uint8 [height, width]."""
    rng, size = surface.rng, view.size
    body, margin = BODIES[view.kind](rng, surface.image, surface.style)
    package = body.transform(size, Image.MESH, warp_mesh(view, margin), Image.BILINEAR)
    seen = np.asarray(surface.ids.transform(size, Image.MESH, warp_mesh(view, (0, 0)), Image.NEAREST))
    alpha = package.getchannel("A")
    picture = Image.new("RGB", size)
    if alpha.getextrema()[0] < 255:  # something of the background is seen
        picture = cast_shadow(rng, draw_background(rng, size), alpha, rng.uniform(0.2, 0.8))
    picture.paste(as_picture(np.asarray(package.convert("RGB"), np.float32) * shading(rng, view)), (0, 0), alpha)
    if rng.random() < 0.22:
        hand = draw_hand(rng, size)
        picture = cast_shadow(rng, picture, hand.getchannel("A"), 0.5)
        picture.paste(hand, (0, 0), hand)
        seen = without_covered(seen, np.asarray(hand.getchannel("A")) > 128)
    lit = as_picture(light_up(rng, np.asarray(picture, np.float32)))
    return through_camera(rng, expose(rng, lit)), seen


# ---- bodies: the package that carries the label --------------------------------------------------------------------


def nothing_but_label(rng: Generator, label: Image.Image, style: Style) -> Body:
    """The label fills the picture."""
    return label.convert("RGBA"), (0, 0)


def tray(rng: Generator, label: Image.Image, style: Style) -> Body:
    """A tray with rounded corners."""
    return round_corners(label.convert("RGBA"), min(label.size) * rng.uniform(0.05, 0.25)), (0, 0)


def carton(rng: Generator, label: Image.Image, style: Style) -> Body:
    """A carton of which a darker neighbouring face is seen to one side."""
    width, height = label.size
    depth = int(width * rng.uniform(0, 0.18))
    canvas = Image.new("RGBA", (width + 2 * depth, height), CLEAR)
    face = mix(style.paper, BLACK, rng.uniform(0.1, 0.5))
    x = 0 if rng.random() < 0.5 else depth + width
    canvas.paste(face, (x, 0, x + depth, height))
    canvas.paste(label, (depth, 0))
    return canvas, (depth, 0)


def bag(rng: Generator, label: Image.Image, style: Style) -> Body:
    """A bag: a wavy silhouette, pressed seams at the top and the bottom."""
    width, height = label.size
    body = label.convert("RGBA")
    body.putalpha(bag_outline(rng, label.size))
    draw, deep = ImageDraw.Draw(body, "RGBA"), int(height * rng.uniform(0.02, 0.06))
    for x in range(0, width, 5):
        draw.line((x, 0, x, deep), fill=(255, 255, 255, 70), width=2)
        draw.line((x + 2, height - deep, x + 2, height), fill=(0, 0, 0, 60), width=2)
    return body, (0, 0)


def bag_outline(rng: Generator, size: Size) -> Image.Image:
    """The mask of a wavy silhouette."""
    width, height = size
    steps = np.linspace(0, 1, 40)
    sides = [width * (0.012 + 0.012 * np.sin(steps * rng.uniform(4, 14) + rng.uniform(0, 6))) for _ in range(2)]
    left = list(zip(sides[0], steps * height, strict=True))
    right = list(zip(width - sides[1], steps * height, strict=True))
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).polygon(left + right[::-1], fill=255)
    return mask


def bottle(rng: Generator, label: Image.Image, style: Style) -> Body:
    """A bottle: glass or plastic above and below its label, shoulders, neck and cap."""
    width, height = label.size
    above, below = int(height * rng.uniform(0.4, 0.8)), int(height * rng.uniform(0.1, 0.5))
    glass = pick(rng, ((30, 70, 40), (90, 50, 20), (225, 235, 235), vivid(rng), (60, 30, 20), style.paper))
    canvas = Image.new("RGBA", (width, above + height + below), CLEAR)
    draw, middle, neck = ImageDraw.Draw(canvas), width / 2, width * rng.uniform(0.12, 0.3)
    draw.rectangle((middle - neck, 0, middle + neck, above), fill=glass)
    draw.rectangle((middle - neck * 1.1, 0, middle + neck * 1.1, above * 0.25), fill=style.accent)
    draw.ellipse((0, above * 0.35, width, above * 1.3), fill=glass)
    draw.rectangle((0, above * 0.8, width, canvas.height), fill=glass)
    canvas.paste(label, (0, above))
    return canvas, (0, above)


def jar(rng: Generator, label: Image.Image, style: Style) -> Body:
    """A jar, a cup or a can: a lid and a rim of contents or metal around the label."""
    width, height = label.size
    above, below = int(height * rng.uniform(0.1, 0.3)), int(height * rng.uniform(0.02, 0.25))
    content = pick(rng, ((120, 30, 20), (200, 150, 60), (190, 190, 195), (60, 30, 15), (235, 230, 220), style.accent))
    canvas = Image.new("RGBA", (width, above + height + below), content)
    lid = pick(rng, (WHITE, style.accent, (180, 180, 185), (200, 160, 60), (180, 30, 30)))
    ImageDraw.Draw(canvas).rectangle((0, 0, width, above * 0.7), fill=lid)
    canvas.paste(label, (0, above))
    return canvas, (0, above)


BODIES = {"fill": nothing_but_label, "tray": tray, "box": carton, "bag": bag, "bottle": bottle, "jar": jar}


# ---- hands ---------------------------------------------------------------------------------------------------------


def draw_hand(rng: Generator, size: Size) -> Image.Image:
    """One to four fingers that reach in from an edge, RGBA."""
    canvas = Image.new("RGBA", (size[0] // 2, size[1] // 2), CLEAR)
    draw, skin, short = ImageDraw.Draw(canvas), mix(pick(rng, SKINS), (200, 140, 120), 0.2), min(canvas.size)
    inward = rng.uniform(0, 2 * np.pi)
    direction = np.array([np.cos(inward), np.sin(inward)])
    normal = np.array([-direction[1], direction[0]])
    start = np.array(canvas.size) * (0.5 - 0.62 * direction) + normal * rng.uniform(-0.3, 0.3) * short
    thick, count = short * rng.uniform(0.13, 0.26), int(rng.choice([1, 1, 2, 3, 4]))
    lean = rng.normal(0, 0.35)  # fingers rarely come in at a right angle
    direction = direction * np.cos(lean) + normal * np.sin(lean)
    for index in range(count):
        aside = index - (count - 1) / 2
        base = start + normal * aside * thick * 1.02 - direction * thick
        reach = thick + short * rng.uniform(0.22, 0.5) * (1 - 0.12 * abs(aside))
        bend = direction + normal * aside * rng.uniform(-0.08, 0.1)
        finger, own_thick = (base, base + bend * reach), thick * rng.uniform(0.9, 1.05)
        draw_finger(draw, finger, own_thick, normal, skin)
        if rng.random() < 0.5:
            draw_nail(draw, finger, own_thick, skin)
    return canvas.filter(ImageFilter.GaussianBlur(0.8)).resize(size, Image.BILINEAR)


def draw_finger(draw: ImageDraw.ImageDraw, finger: Finger, thick: float, light: np.ndarray, skin: Color) -> None:
    """A shaded capsule that gets narrower: layers from dark and wide to light and narrow, shifted to the light."""
    base, tip = finger
    for step in range(7):
        width = thick * (1 - 0.12 * step)
        color = mix(mix(skin, (70, 25, 15), 0.42 - 0.07 * step), WHITE, 0.02 * step)
        start, middle, end = (point + light * thick * 0.03 * step for point in (base, (base + tip) / 2, tip))
        draw.line((*start, *middle), fill=color, width=round(width * 1.12))
        for share in (0, 0.33, 0.66, 1):
            disc(draw, middle + (end - middle) * share, width * (1.12 - 0.16 * share), color)
        draw.line((*middle, *end), fill=color, width=round(width))


def draw_nail(draw: ImageDraw.ImageDraw, finger: Finger, thick: float, skin: Color) -> None:
    """The nail of a finger: an oval of three discs."""
    base, tip = finger
    along = (tip - base) / np.hypot(*(tip - base))
    for share in (-0.12, 0, 0.12):
        disc(draw, tip + along * thick * (0.12 + share), thick * 0.5, mix(skin, (250, 215, 210), 0.5))


def disc(draw: ImageDraw.ImageDraw, center: np.ndarray, width: float, color: Color) -> None:
    """A filled circle of a diameter `width`."""
    draw.ellipse((*(center - width / 2), *(center + width / 2)), fill=color)


def without_covered(seen: np.ndarray, hand: np.ndarray) -> np.ndarray:
    """The mask of ids less those that a hand (bool [height, width]) hides by half or more; others stay whole."""
    areas, covered = np.bincount(seen.ravel(), minlength=256), np.bincount(seen[hand], minlength=256)
    return np.where(covered[seen] * 2 >= areas[seen], 0, seen).astype(np.uint8)


# ---- light ---------------------------------------------------------------------------------------------------------


def cast_shadow(rng: Generator, picture: Image.Image, alpha: Image.Image, strength: float) -> Image.Image:
    """Darken the picture beside and below what `alpha` covers."""
    small = alpha.resize((alpha.width // 4, alpha.height // 4)).filter(ImageFilter.GaussianBlur(rng.uniform(1, 4)))
    moved = Image.new("L", small.size, 0)
    moved.paste(small, (int(rng.integers(-4, 5)), int(rng.integers(0, 5))))
    shade = moved.resize(alpha.size, Image.BILINEAR).point(lambda value: int(value * strength))
    return Image.composite(Image.new("RGB", picture.size, (8, 8, 10)), picture, shade)


def shading(rng: Generator, view: View) -> np.ndarray:
    """Brightness of the package by its form, float32 [height, width, 1]: round things are darker sideways."""
    columns, rows = (side // 7 for side in view.size)
    points = grid_points((np.arange(columns) + 0.5) * 7, (np.arange(rows) + 0.5) * 7)
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
    return enlarge(gain.reshape(rows, columns), view.size)


def light_up(rng: Generator, pixels: np.ndarray) -> np.ndarray:
    """Uneven light, vignette, glare and soft shadows on float32 pixels [height, width, 3] of 0..255."""
    size = pixels.shape[1::-1]
    y, x = np.meshgrid(np.linspace(-1, 1, 32), np.linspace(-1, 1, 32), indexing="ij")
    turn = rng.uniform(0, 2 * np.pi)
    gain = 1 + rng.uniform(0, 0.3) * (x * np.cos(turn) + y * np.sin(turn)) - rng.uniform(0, 0.15) * (x**2 + y**2)
    if rng.random() < 0.25:
        edge = x * np.cos(turn + 1) + y * np.sin(turn + 1) - rng.uniform(-0.7, 0.7)
        gain *= 1 - rng.uniform(0.2, 0.5) / (1 + np.exp(-edge * rng.uniform(5, 40)))
    pixels = pixels * enlarge(gain, size)
    lamps = [glare(rng, x, y, turn) for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.6, 0.25, 0.1, 0.05])))]
    return pixels + enlarge(sum(lamps), size) if lamps else pixels


def glare(rng: Generator, x: np.ndarray, y: np.ndarray, turn: float) -> np.ndarray:
    """Reflection of a lamp, a spot or a streak along the direction `turn`; x and y run from -1 to 1."""
    u, v = x - rng.uniform(-1, 1), y - rng.uniform(-1, 1)
    along, aside = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
    narrow, long = rng.uniform(0.05, 0.25), rng.uniform(0.1, 0.9)
    return rng.uniform(30, 220) * np.exp(-((aside / narrow) ** 2) - (along / long) ** 2)


def enlarge(coarse: np.ndarray, size: Size) -> np.ndarray:
    """A coarse map at the picture's size, float32 [height, width, 1]."""
    return np.asarray(Image.fromarray(coarse.astype(np.float32)).resize(size, Image.BILINEAR))[..., None]


# ---- camera --------------------------------------------------------------------------------------------------------


def expose(rng: Generator, picture: Image.Image) -> Image.Image:
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


def through_camera(rng: Generator, picture: Image.Image) -> Image.Image:
    """Defocus or motion blur, loss of resolution, noise, JPEG."""
    width, height = picture.size
    picture = blur(rng, picture)
    if rng.random() < 0.2:
        share = rng.uniform(0.4, 0.8)
        small = picture.resize((int(width * share), int(height * share)), Image.BILINEAR)
        picture = small.resize((width, height), Image.BILINEAR)
    grain = rng.standard_normal((height, width, 1), np.float32) * rng.gamma(1.5, 2)
    buffer = io.BytesIO()
    noisy = as_picture(np.asarray(picture, np.float32) + grain)
    noisy.save(buffer, "JPEG", quality=int(rng.integers(40, 96)))
    return Image.open(buffer).convert("RGB")


def blur(rng: Generator, picture: Image.Image) -> Image.Image:
    """A little or much out of focus, or moved, or sharp."""
    chance = rng.random()
    if chance < 0.48:
        return picture.filter(ImageFilter.BoxBlur(rng.uniform(0.1, 1)))
    if chance < 0.6:
        return picture.filter(ImageFilter.GaussianBlur(rng.uniform(1.2, 3)))
    if chance < 0.7:
        kernel = np.eye(5) if rng.random() < 0.5 else np.outer([0, 0, 1, 0, 0], np.ones(5))
        kernel = kernel.T if rng.random() < 0.5 else kernel
        return picture.filter(ImageFilter.Kernel((5, 5), kernel.ravel().tolist()))
    return picture
