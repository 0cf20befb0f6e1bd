"""Procedural captioned scenes: one object of one colour, at one place, on one ground, at one time of day."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (206, 38, 38),
    "orange": (242, 136, 20),
    "yellow": (250, 226, 60),
    "green": (40, 172, 72),
    "blue": (34, 78, 204),
    "purple": (128, 48, 176),
    "pink": (250, 130, 196),
    "white": (246, 246, 246),
}
OBJECTS = ("house", "tree", "boat", "balloon", "star", "fish", "mushroom", "car")
PLACES = {"left": 0.25, "middle": 0.5, "right": 0.75}
GROUNDS: dict[str, RGB] = {
    "grass": (86, 152, 66),
    "sand": (226, 200, 140),
    "snow": (228, 236, 246),
    "sea": (24, 92, 150),
}
SKIES: dict[str, tuple[RGB, RGB]] = {
    "day": ((78, 158, 236), (152, 208, 250)),
    "sunset": ((112, 70, 132), (252, 172, 128)),
    "night": ((12, 16, 50), (38, 50, 104)),
}
GROUND_LIGHT = {"day": 1.0, "sunset": 0.8, "night": 0.45}
OBJECT_LIGHT = {"day": 1.0, "sunset": 0.92, "night": 0.8}
SHADE = 0.66
SUN: RGB = (255, 238, 120)
MOON: RGB = (238, 236, 208)
NIGHT_STARS = ((0.08, 0.10), (0.24, 0.05), (0.38, 0.14), (0.55, 0.06), (0.64, 0.16), (0.14, 0.20))

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": tuple(COLOURS),
    "place": tuple(PLACES),
    "ground": tuple(GROUNDS),
    "time": tuple(SKIES),
}
OBJECT_SCALE = 3
HELD_OUT = 64
HELD_OUT_SEED = 2026


@dataclass(frozen=True)
class Scene:
    """One combination of the five attributes."""

    object: str
    colour: str
    place: str
    ground: str
    time: str

    def phrases(self) -> tuple[str, str, str, str]:
        """The four phrases of the caption: object with colour, place, ground, time."""
        article = "an" if self.colour[0] in "aeiou" else "a"
        where = "in the middle" if self.place == "middle" else f"on the {self.place}"
        when = {"day": "by day", "sunset": "at sunset", "night": "at night"}[self.time]
        return f"{article} {self.colour} {self.object}", where, f"on the {self.ground}", when

    @property
    def caption(self) -> str:
        """For example "an orange boat in the middle, on the sea, at night"."""
        subject, where, ground, when = self.phrases()
        return f"{subject} {where}, {ground}, {when}"


@dataclass(frozen=True)
class Layout:
    """What the caption leaves open, in fractions of the image side."""

    horizon: float = 0.66
    x_shift: float = 0.0
    unit: float = 0.168

    @staticmethod
    def sample(rng: random.Random) -> Layout:
        """A layout with a small jitter."""
        return Layout(rng.uniform(0.645, 0.675), rng.uniform(-0.015, 0.015), rng.uniform(0.162, 0.174))

    @property
    def base(self) -> float:
        """Height at which objects stand, a little below the horizon."""
        return self.horizon + 0.35 * self.unit


def all_scenes() -> list[Scene]:
    """Every combination of attributes, in a fixed order."""
    return [Scene(*values) for values in itertools.product(*ATTRIBUTES.values())]


def split() -> tuple[list[Scene], list[Scene]]:
    """(training combinations, the 64 held-out combinations); disjoint and always the same."""
    scenes = all_scenes()
    held_out = random.Random(HELD_OUT_SEED).sample(scenes, HELD_OUT)
    excluded = set(held_out)
    return [scene for scene in scenes if scene not in excluded], held_out


def vocabulary() -> list[str]:
    """Every word of every caption, sorted."""
    return sorted({word.strip(",") for scene in all_scenes() for word in scene.caption.split()})


def scaled(colour: RGB, factor: float) -> RGB:
    """The colour times a brightness factor."""
    red, green, blue = (round(channel * factor) for channel in colour)
    return red, green, blue


BROWN: RGB = (104, 66, 38)
CREAM: RGB = (244, 230, 198)
GLASS: RGB = (196, 226, 240)
DARK: RGB = (34, 34, 42)
Part = tuple[str, list[tuple[float, float]], str | RGB]


def object_parts(name: str) -> list[Part]:
    """Parts (shape, corner points, fill) back to front, in units, x right and y down from the object's foot.

    fill is "body" (the colour of the caption), "shade" (the same, darker) or a fixed RGB.
    """
    if name == "house":
        return [
            ("polygon", [(-1, -1.3), (1, -1.3), (1, 0), (-1, 0)], "body"),
            ("polygon", [(-1.3, -1.25), (1.3, -1.25), (0, -2.4)], "shade"),
            ("polygon", [(-0.26, -0.8), (0.26, -0.8), (0.26, 0), (-0.26, 0)], BROWN),
        ]
    if name == "tree":
        return [
            ("polygon", [(-0.22, -0.7), (0.22, -0.7), (0.22, 0), (-0.22, 0)], BROWN),
            ("polygon", [(-1.2, -0.5), (1.2, -0.5), (0, -1.8)], "body"),
            ("polygon", [(-0.98, -1.2), (0.98, -1.2), (0, -2.4)], "body"),
            ("polygon", [(-0.74, -1.9), (0.74, -1.9), (0, -2.95)], "body"),
        ]
    if name == "boat":
        return [
            ("polygon", [(-0.07, -2.8), (0.07, -2.8), (0.07, -0.6), (-0.07, -0.6)], BROWN),
            ("polygon", [(0.07, -2.7), (0.07, -0.72), (1.25, -0.72)], "body"),
            ("polygon", [(-0.07, -2.4), (-0.07, -0.72), (-1.0, -0.72)], "body"),
            ("polygon", [(-1.35, -0.6), (1.35, -0.6), (0.9, 0.1), (-0.9, 0.1)], BROWN),
        ]
    if name == "balloon":
        return [
            ("polygon", [(-0.86, -1.45), (0.86, -1.45), (0.26, -0.6), (-0.26, -0.6)], "body"),
            ("ellipse", [(-1.1, -3.05), (1.1, -0.95)], "body"),
            ("ellipse", [(-0.42, -3.05), (0.42, -0.75)], "shade"),
            ("polygon", [(-0.28, -0.5), (0.28, -0.5), (0.22, 0), (-0.22, 0)], BROWN),
        ]
    if name == "star":
        radii = [1.4 if i % 2 == 0 else 0.58 for i in range(10)]
        points = [(r * math.sin(i * math.pi / 5), -1.55 - r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
        return [("polygon", points, "body")]
    if name == "fish":
        return [
            ("polygon", [(0.5, -1.3), (1.4, -2.0), (1.4, -0.6)], "shade"),
            ("ellipse", [(-1.4, -2.05), (0.85, -0.55)], "body"),
            ("ellipse", [(-1.0, -1.68), (-0.66, -1.34)], DARK),
        ]
    if name == "mushroom":
        return [
            ("polygon", [(-0.38, -1.4), (0.38, -1.4), (0.46, 0), (-0.46, 0)], CREAM),
            ("dome", [(-1.3, -2.7), (1.3, 0.3)], "body"),
            ("ellipse", [(-0.22, -2.4), (0.26, -1.92)], CREAM),
            ("ellipse", [(-0.88, -1.85), (-0.46, -1.43)], CREAM),
            ("ellipse", [(0.46, -1.85), (0.88, -1.43)], CREAM),
        ]
    if name == "car":
        return [
            ("polygon", [(-0.95, -1.15), (-0.6, -1.95), (0.55, -1.95), (0.95, -1.15)], "body"),
            ("polygon", [(-0.66, -1.15), (-0.45, -1.7), (0.42, -1.7), (0.68, -1.15)], GLASS),
            ("polygon", [(-1.45, -1.2), (1.3, -1.2), (1.45, -1.0), (1.45, -0.35), (-1.45, -0.35)], "body"),
            ("ellipse", [(-1.15, -0.72), (-0.39, 0.04)], DARK),
            ("ellipse", [(0.39, -0.72), (1.15, 0.04)], DARK),
        ]
    raise ValueError(f"unknown object {name!r}; one of {OBJECTS}")


def _draw_parts(draw: ImageDraw.ImageDraw, name: str, x: float, foot: float, unit: float, fills: dict) -> None:
    for shape, points, fill in object_parts(name):
        corners = [(x + px * unit, foot + py * unit) for px, py in points]
        colour = fills[fill] if isinstance(fill, str) else fills["fixed"](fill)
        if shape == "polygon":
            draw.polygon(corners, fill=colour)
        elif shape == "ellipse":
            draw.ellipse([*corners[0], *corners[1]], fill=colour)
        else:
            draw.pieslice([*corners[0], *corners[1]], 180, 360, fill=colour)


def background(ground: str, time: str, horizon: float, size: int = 96) -> np.ndarray:
    """The scene without its object, uint8 [size, size, 3]."""
    return np.asarray(_background(ground, time, horizon, size * OBJECT_SCALE).reduce(OBJECT_SCALE))


def _background(ground: str, time: str, horizon: float, side: int) -> Image.Image:
    top, bottom = (np.array(colour, dtype=np.float64) for colour in SKIES[time])
    depth = np.clip(np.arange(side) / (0.66 * side), 0, 1)[:, None, None]
    sky = np.broadcast_to((1 - depth) * top + depth * bottom, (side, side, 3))
    image = Image.fromarray(np.ascontiguousarray(sky.round().astype(np.uint8)))
    draw = ImageDraw.Draw(image)
    if time == "day":
        draw.ellipse([0.81 * side, 0.05 * side, 0.95 * side, 0.19 * side], fill=SUN)
    if time == "night":
        draw.ellipse([0.81 * side, 0.05 * side, 0.95 * side, 0.19 * side], fill=MOON)
        draw.ellipse(
            [0.77 * side, 0.03 * side, 0.90 * side, 0.16 * side], fill=tuple(sky[int(0.1 * side), 0].astype(int))
        )
        for x, y in NIGHT_STARS:
            draw.ellipse([(x - 0.012) * side, (y - 0.012) * side, (x + 0.012) * side, (y + 0.012) * side], fill=MOON)
    draw.rectangle([0, round(horizon * side), side, side], fill=scaled(GROUNDS[ground], GROUND_LIGHT[time]))
    return image


def render(scene: Scene, layout: Layout | None = None, size: int = 96) -> np.ndarray:
    """The picture of a scene, uint8 [size, size, 3]."""
    layout = layout or Layout()
    side = size * OBJECT_SCALE
    image = _background(scene.ground, scene.time, layout.horizon, side)
    light = OBJECT_LIGHT[scene.time]
    body = scaled(COLOURS[scene.colour], light)
    fills = {"body": body, "shade": scaled(body, SHADE), "fixed": lambda colour: scaled(colour, light)}
    x = (PLACES[scene.place] + layout.x_shift) * side
    _draw_parts(ImageDraw.Draw(image), scene.object, x, layout.base * side, layout.unit * side, fills)
    return np.asarray(image.reduce(OBJECT_SCALE))


def silhouette(name: str, layout: Layout | None = None, size: int = 96) -> np.ndarray:
    """Where the object is when it stands in the middle, bool [size, size]."""
    layout = layout or Layout()
    side = size * OBJECT_SCALE
    image = Image.new("L", (side, side))
    fills = {"body": 255, "shade": 255, "fixed": lambda colour: 255}
    x = (0.5 + layout.x_shift) * side
    _draw_parts(ImageDraw.Draw(image), name, x, layout.base * side, layout.unit * side, fills)
    return np.asarray(image.reduce(OBJECT_SCALE)) > 127


def training_scenes(count: int, seed: int) -> Iterator[tuple[Scene, Layout]]:
    """`count` training combinations, each as often as the others, with random layouts."""
    scenes, _ = split()
    rng = random.Random(seed)
    for start in range(0, count, len(scenes)):
        for scene in rng.sample(scenes, min(len(scenes), count - start)):
            yield scene, Layout.sample(rng)
