"""How a camera sees a label: rotation, perspective, the curve of a bottle, creases.

Coordinates: *picture* pixels are those of the photograph, *label* pixels those of the flat label. `to_label` maps the
first to the second (the direction that resampling needs); a `View` holds all that this map depends on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image

from helpers.tiny.printing import Point, Size, pick

NODE_STEP = 28  # pixels between the nodes of the warp; divides every picture size


@dataclass(frozen=True)
class View:
    """How the camera sees the label."""

    size: Size  # of the picture
    label_size: Size
    center: Point  # where the label's centre lies in the picture, pixels
    angle: float  # rotation in the picture, radians
    tilt: Point  # perspective: change of scale per pixel to the right and down
    radius: float  # of the cylinder that the label is wrapped around, pixels; 0 for flat
    waves: np.ndarray  # creases [n, 4]: wave numbers across and down, phase, displacement in pixels
    kind: str  # "fill" (the label is larger than the picture) or a body: box, bag, bottle, jar, tray


def choose_view(rng: Generator, size: Size, tables: list[Point]) -> View:
    """A view that leaves room for tables of the wanted extents (pixels of the picture)."""
    room = [max(table[k] for table in tables) * 1.15 for k in (0, 1)]
    fills = rng.random() < 0.55 or room[0] > 0.75 * size[0] or room[1] > 0.7 * size[1] or len(tables) > 1
    kind = "fill" if fills else pick(rng, ("box", "box", "bag", "bottle", "jar", "tray"))
    if fills:
        label_size = tuple(int(side * rng.uniform(1.1, 1.5)) for side in size)
    else:
        label_size = tuple(int(rng.uniform(max(0.5 * size[k], room[k]), 0.92 * size[k])) for k in (0, 1))
    # who fills the frame holds the phone straight
    calm = 0.35 if room[0] > 0.8 * size[0] or room[1] > 0.8 * size[1] else 1.0
    angle = calm * np.deg2rad(np.clip(rng.normal(0, 5) if rng.random() < 0.8 else rng.uniform(-20, 20), -20, 20))
    curved = rng.random() < 0.25 if fills else kind in ("bottle", "jar")
    radius = max(label_size[0] * rng.uniform(0.34, 0.6), 0.62 * room[0]) if curved else 0.0
    spare = [abs(label_size[k] - size[k]) / 2 for k in (0, 1)]
    center = tuple(size[k] / 2 + rng.uniform(-0.8, 0.8) * spare[k] * (0.5 if curved else 1) for k in (0, 1))
    tilt = tuple(rng.normal(0, 0.16 if rng.random() < 0.5 else 0.05, 2).clip(-0.35, 0.35) / max(size))
    return View(size, label_size, center, float(angle), tilt, radius, choose_waves(rng, kind), kind)


def choose_waves(rng: Generator, kind: str) -> np.ndarray:
    """Creases: none on boxes and glass, some on most other things, strong ones on bags."""
    strength = rng.choice([0, 0, 0.6, 1.5]) if kind == "fill" else {"bag": 1.3, "tray": 0.4}.get(kind, 0)
    count = int(rng.integers(3, 8)) if strength else 0
    length, direction = rng.uniform(35, 220, count), rng.uniform(0, 2 * np.pi, count)
    shift = strength * rng.uniform(0.3, 1, count) * length / 40
    numbers = 2 * np.pi / length
    return np.stack([numbers * np.cos(direction), numbers * np.sin(direction), rng.uniform(0, 6.3, count), shift], 1)


def grid_points(xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """All points [n, 2] of a grid, row by row."""
    return np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)


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


def warp_mesh(view: View, margin: Size) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """The warp for `Image.transform`: rectangles of the picture, and where their corners lie on the body."""
    step = NODE_STEP // 2 if len(view.waves) else NODE_STEP  # creases are shorter than the curve of a bottle
    columns, rows = (side // step for side in view.size)
    nodes = grid_points(np.arange(columns + 1), np.arange(rows + 1)) * step
    source = (to_label(view, nodes.astype(float)) + margin).reshape(rows + 1, columns + 1, 2)
    quads = np.concatenate([source[:-1, :-1], source[1:, :-1], source[1:, 1:], source[:-1, 1:]], -1).reshape(-1, 8)
    nodes = nodes.reshape(rows + 1, columns + 1, 2)
    rectangles = np.concatenate([nodes[:-1, :-1], nodes[1:, 1:]], -1).reshape(-1, 4)
    return list(zip(map(tuple, rectangles.tolist()), map(tuple, quads.tolist()), strict=True))


def hidden_cells(view: View, cell: int) -> np.ndarray:
    """Which cells (of `cell` pixels) of the label the camera does not see well: bool [rows, columns]."""
    points = grid_points(np.arange(2, view.size[0], 4), np.arange(2, view.size[1], 4))
    cells = np.floor(to_label(view, points) / cell).astype(int)
    columns, rows = (side // cell for side in view.label_size)
    inside = ((cells >= 0) & (cells < (columns, rows))).all(1)
    hidden = np.ones((rows, columns), bool)
    hidden[cells[inside, 1], cells[inside, 0]] = False
    hidden[[0, -1]] = hidden[:, [0, -1]] = True
    return hidden


def visible_shares(view: View, ids: Image.Image) -> np.ndarray:
    """Share of each id's area that lies in the picture, by id (entry 0 is the background)."""
    step, reach = 6, 0.6
    points = grid_points(*(np.arange(-reach * side, (1 + reach) * side, step) for side in view.size))
    spots = np.floor(to_label(view, points)).astype(int)
    on_label = ((spots >= 0) & (spots < ids.size)).all(1)
    found = np.where(on_label, np.asarray(ids)[tuple(np.clip(spots, 0, np.array(ids.size) - 1).T[::-1])], 0)
    inside = ((points >= 0) & (points < view.size)).all(1)
    everywhere = np.bincount(found, minlength=256)
    return np.bincount(found[inside], minlength=256) / np.maximum(everywhere, 1)
