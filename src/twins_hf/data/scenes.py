"""A generated segmentation set: streets and rooms drawn by a seeded generator, for runs without a download.

Every scene is a small three-dimensional world, in metres, seen by a pinhole camera and painted from far to near. The
eleven classes bear names of the ADE20K benchmark. Facades, walls, doors, sofas and cars are painted from one range of
colours, so that shape, texture and place tell the classes apart and colour alone does not.

Masks follow ADE20K: 0 is unlabelled, 1 to 11 are the classes in the order of `SCENE_CLASSES`.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Split, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageFilter

SCENE_CLASSES = (
    "wall",
    "building, edifice",
    "sky",
    "floor, flooring",
    "tree",
    "ceiling",
    "road, route",
    "windowpane, window",
    "sidewalk, pavement",
    "car, auto, automobile, machine, motorcar",
    "sofa, couch, lounge",
)
UNLABELLED, WALL, BUILDING, SKY, FLOOR, TREE, CEILING, ROAD, WINDOW, SIDEWALK, CAR, SOFA = range(12)

# Strength of the surface grain by mask value, in grey levels: leaves and asphalt are rough, painted walls are not.
GRAIN = np.array([3, 2, 3, 1, 3, 11, 1.5, 7, 2, 4.5, 2, 4], dtype=np.float32)

# What walls, facades, sofas and cars have in common.
PAINTS = (
    (196, 108, 82), (232, 212, 176), (150, 172, 136), (104, 128, 152), (208, 152, 146), (214, 166, 88), (168, 164, 158),
    (72, 132, 134), (70, 90, 128), (154, 82, 70), (236, 232, 224), (88, 90, 98), (164, 194, 214), (170, 156, 192),
)  # fmt: skip
LEAVES = ((86, 128, 62), (112, 148, 74), (62, 104, 66), (142, 156, 78), (196, 146, 60), (186, 100, 62), (214, 150, 160))
WOODS = ((176, 130, 88), (146, 102, 68), (204, 168, 124), (116, 84, 64), (188, 178, 166), (150, 150, 150))
# Zenith, horizon, light on the scene.
SKIES = (
    ((88, 150, 214), (204, 226, 238), (1.04, 1.02, 0.98)),
    ((120, 172, 222), (236, 238, 232), (1.02, 1.02, 1.00)),
    ((156, 168, 182), (220, 222, 222), (0.93, 0.95, 0.98)),
    ((110, 128, 186), (250, 200, 156), (1.06, 0.97, 0.88)),
    ((74, 86, 140), (232, 160, 158), (0.90, 0.84, 0.92)),
)
GLASS = (74, 92, 112)
NEAR = 0.5

Colour = tuple[int, ...]
Plane = Callable[[float, float], tuple[float, float, float]]


def mix(first: Colour, second: Colour, amount: float) -> Colour:
    """The colour `amount` (0 to 1) of the way from `first` to `second`."""
    return tuple(round(a + (b - a) * amount) for a, b in zip(first[:3], second[:3], strict=True))


def shade(colour: Colour, factor: float) -> Colour:
    """`colour` darkened (factor below 1) or brightened, within 0 to 255."""
    return tuple(min(255, round(value * factor)) for value in colour[:3])


def pick(rng: np.random.Generator, colours: tuple[Colour, ...], spread: float = 14) -> Colour:
    """One of `colours`, moved by up to `spread` grey levels in every channel."""
    colour = colours[rng.integers(len(colours))]
    return tuple(int(min(255, max(0, value + rng.uniform(-spread, spread)))) for value in colour)


class View:
    """A pinhole camera over a picture and its mask, both at twice the final size so that the picture is antialiased.

    The world is in metres: x to the right of the camera, y up from the ground, z ahead. A colour of four numbers is
    blended by its alpha. A label of None leaves the mask as it is.
    """

    def __init__(self, height: int, width: int, horizon: float, vanish: float, focal: float, eye: float):
        self.height, self.width = height, width
        self.horizon, self.vanish, self.focal, self.eye = horizon * height, vanish * width, focal * width, eye
        self.image = Image.new("RGB", (2 * width, 2 * height))
        self.mask = Image.new("L", (2 * width, 2 * height))
        self.paint = ImageDraw.Draw(self.image, "RGBA")
        self.mark = ImageDraw.Draw(self.mask)

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        scale = 2 * self.focal / max(z, NEAR)
        return 2 * self.vanish + x * scale, 2 * self.horizon + (self.eye - y) * scale

    def polygon(self, points: list[tuple[float, float, float]], colour: Colour, label: int | None = None) -> None:
        corners = [self.project(*point) for point in points]
        self.paint.polygon(corners, fill=colour)
        if label is not None:
            self.mark.polygon(corners, fill=label)

    def panel(
        self, plane: Plane, left: float, right: float, low: float, high: float, colour: Colour, label: int | None = None
    ) -> None:
        """A rectangle in the two coordinates of `plane`."""
        corners = (left, low), (right, low), (right, high), (left, high)
        self.polygon([plane(u, v) for u, v in corners], colour, label)

    def line(self, start: tuple[float, float, float], end: tuple[float, float, float], colour: Colour) -> None:
        self.paint.line([self.project(*start), self.project(*end)], fill=colour)

    def disc(self, x: float, y: float, z: float, radius: float, colour: Colour, label: int | None = None) -> None:
        (column, row), size = self.project(x, y, z), 2 * self.focal / z * radius
        box = (column - size, row - size, column + size, row + size)
        self.paint.ellipse(box, fill=colour)
        if label is not None:
            self.mark.ellipse(box, fill=label)

    def shadow(self, x0: float, x1: float, z0: float, z1: float, strength: int = 90) -> None:
        self.panel(lambda x, z: (x, 0.0, z), x0, x1, z0, z1, (20, 22, 40, strength))

    def box(
        self, x0: float, x1: float, y0: float, y1: float, z0: float, z1: float, colour: Colour, label: int | None = None
    ) -> None:
        """A block: its top or underside, the side that faces the camera, its front."""
        if y1 < self.eye:
            self.panel(lambda x, z: (x, y1, z), x0, x1, z0, z1, shade(colour, 1.12), label)
        for side in [x for x in (x0, x1) if (x0 > 0 and x == x0) or (x1 < 0 and x == x1)]:
            self.panel(lambda z, y, x=side: (x, y, z), z0, z1, y0, y1, shade(colour, 0.78), label)
        self.panel(lambda x, y: (x, y, z0), x0, x1, y0, y1, colour, label)


def draw_sky(view: View, rng: np.random.Generator, sky: tuple) -> None:
    """A vertical gradient with soft clouds and now and then a sun's glow, down to the lower edge of the picture."""
    zenith, horizon, _ = (np.array(colour, dtype=np.float32) for colour in sky)
    rows, columns = np.mgrid[0:1:48j, 0:1:64j].astype(np.float32)
    height = np.clip(rows / (view.horizon / view.height), 0, 1)[..., None]
    colours = zenith + (horizon - zenith) * height
    clouds = np.zeros((48, 64), dtype=np.float32)
    for cells, weight in ((3, 0.6), (6, 0.3), (14, 0.2)):
        noise = Image.fromarray(rng.random((2 * cells, cells), dtype=np.float32))
        clouds += weight * np.asarray(noise.resize((64, 48), Image.Resampling.BICUBIC))
    cover = np.clip((clouds - rng.uniform(0.5, 0.75)) * 4, 0, 0.85)[..., None]
    colours += (mix(horizon, (255, 255, 255), 0.6) - colours) * cover
    if rng.random() < 0.5:
        distance = (columns - rng.uniform(0.2, 0.8)) ** 2 + (rows - rng.uniform(0.1, 0.35)) ** 2
        colours += (np.array((255, 246, 214)) - colours) * (0.9 / (1 + 160 * distance))[..., None]
    picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
    view.image.paste(picture.resize(view.image.size, Image.Resampling.BICUBIC))
    view.mark.rectangle((0, 0, *view.mask.size), fill=SKY)


def draw_pavement(view: View, rng: np.random.Generator, x0: float, x1: float, z0: float, z1: float) -> None:
    """Slabs with joints along both directions of the ground."""
    colour = pick(rng, ((190, 182, 172), (164, 164, 168), (200, 176, 156), (150, 146, 144)))
    view.panel(lambda x, z: (x, 0.0, z), x0, x1, z0, z1, colour, SIDEWALK)
    slab = rng.uniform(0.8, 1.3)
    for x in np.arange(max(x0, -14), min(x1, 14), slab):
        view.line((x, 0, z0), (x, 0, min(z1, 24)), (60, 50, 50, 70))
    for z in np.arange(z0, min(z1, 24), slab):
        view.line((x0, 0, z), (x1, 0, z), (60, 50, 50, 70))


def draw_road(
    view: View, rng: np.random.Generator, x0: float, x1: float, z0: float, z1: float, along: str, crossing: bool
) -> None:
    """Asphalt with pale kerbs, lane dashes along one axis and, where asked, a zebra crossing."""
    asphalt = shade(pick(rng, ((104, 104, 110), (128, 124, 122), (84, 86, 96), (146, 142, 140))), rng.uniform(0.85, 1.1))
    kerb, paint = 0.25, pick(rng, ((236, 234, 224), (240, 214, 130)), 8)
    ground = lambda x, z: (x, 0.0, z)  # noqa: E731
    if along == "z":
        view.panel(ground, x0 - kerb, x1 + kerb, z0, z1, (214, 210, 202), SIDEWALK)
        view.panel(ground, x0, x1, z0, z1, asphalt, ROAD)
        middle = (x0 + x1) / 2
        for z in np.arange(rng.uniform(1, 3), 50, 4):
            view.panel(ground, middle - 0.09, middle + 0.09, z, z + 1.8, paint)
    else:
        view.panel(ground, x0, x1, z0 - kerb, z1 + kerb, (214, 210, 202), SIDEWALK)
        view.panel(ground, x0, x1, z0, z1, asphalt, ROAD)
        middle = (z0 + z1) / 2
        for x in np.arange(-20 + rng.uniform(0, 3), 20, 4):
            view.panel(ground, x, x + 1.8, middle - 0.09, middle + 0.09, paint)
    if crossing:
        z = rng.uniform(5, 9)
        for x in np.arange(x0 + 0.3, x1 - 0.5, 1.0):
            view.panel(ground, x, x + 0.5, z, z + 2.5, (236, 234, 228))


def draw_facade(
    view: View, rng: np.random.Generator, plane: Plane, u0: float, u1: float, top: float, colour: Colour, style: int
) -> None:
    """Courses of brick or bands between the floors, a grid of windows, an awning over the ground floor's shop."""
    storey = 3.0
    view.panel(plane, u0, u1, 0, top, colour, BUILDING)
    if style == 0:
        for v in np.arange(0.4, top, 0.4):
            view.line(plane(u0, v), plane(u1, v), (40, 20, 20, 46))
    columns = max(1, int((u1 - u0) / 2.0))
    pitch = (u1 - u0) / columns
    wide, tall = (0.84, 1.9) if style == 2 else (0.52, 1.5)
    for floor in range(int(top / storey)):
        base = floor * storey
        if style == 1 and floor:
            view.panel(plane, u0, u1, base - 0.12, base + 0.12, shade(colour, 1.18), BUILDING)
        for column in range(columns):
            left = u0 + (column + (1 - wide) / 2) * pitch
            right = left + wide * pitch
            low, high = (0.1, 2.2) if floor == 0 and column % 3 == 1 else (base + 0.8, base + 0.8 + tall)
            glass = (250, 214, 140) if rng.random() < 0.12 else shade(GLASS, rng.uniform(0.75, 1.5))
            view.panel(plane, left - 0.1, right + 0.1, low - 0.1, high + 0.1, shade(colour, 1.25), BUILDING)
            view.panel(plane, left, right, low, high, glass)
            view.panel(plane, left, right, (low + high) / 2, high, (255, 255, 255, 34))
    if style < 2 and u1 - u0 > 3 and rng.random() < 0.5:
        draw_awning(view, rng, plane, u0 + 0.4, u1 - 0.4)


def draw_awning(view: View, rng: np.random.Generator, plane: Plane, u0: float, u1: float) -> None:
    """A striped awning on a facade."""
    cloth = pick(rng, PAINTS)
    for stripe, u in enumerate(np.arange(u0, u1, 0.5)):
        colour = cloth if stripe % 2 else (240, 236, 228)
        view.panel(plane, u, min(u + 0.5, u1), 2.35, 3.0, colour, BUILDING)


def draw_building(
    view: View, rng: np.random.Generator, x0: float, x1: float, z0: float, z1: float, haze: Colour
) -> None:
    """A block of flats: the side along the street and the front towards the camera, under a cornice."""
    top = 3.0 * rng.integers(2, 6) + 0.8
    colour = mix(shade(pick(rng, PAINTS), rng.uniform(0.8, 1.08)), haze, min(0.6, z0 / 80))
    style = int(rng.integers(3))
    if x0 > 0 or x1 < 0:
        x = x0 if x0 > 0 else x1
        draw_facade(view, rng, lambda u, v: (x, v, u), max(z0, 2.0), z1, top, shade(colour, 0.86), style)
        view.panel(lambda u, v: (x, v, u), max(z0, 2.0), z1, top - 0.3, top + 0.2, shade(colour, 1.1), BUILDING)
    if z0 > 2:
        draw_facade(view, rng, lambda u, v: (u, v, z0), x0, x1, top, colour, style)
        view.panel(lambda u, v: (u, v, z0), x0 - 0.15, x1 + 0.15, top - 0.3, top + 0.2, shade(colour, 1.2), BUILDING)


def draw_tree(view: View, rng: np.random.Generator, x: float, z: float, haze: Colour) -> None:
    """A trunk, a canopy of overlapping discs and dabs of lit and shaded leaves."""
    height, spread = rng.uniform(3.6, 6.0), rng.uniform(1.0, 1.7)
    leaf = mix(pick(rng, LEAVES, 18), haze, min(0.5, z / 80))
    trunk = mix(pick(rng, ((96, 72, 56), (120, 104, 92))), haze, min(0.5, z / 80))
    view.shadow(x - spread, x + spread, z - 0.6, z + 0.6, 70)
    view.panel(lambda u, v: (u, v, z), x - 0.14, x + 0.14, 0, height - spread, trunk, TREE)
    angles, reach = rng.uniform(0, 6.28, 70), np.sqrt(rng.random(70)) * spread
    offsets = list(zip(np.cos(angles) * reach, np.sin(angles) * reach * 0.9, strict=True))
    for across, up in offsets[:14]:
        view.disc(x + across, height + up - 0.4, z, spread * 0.42, shade(leaf, 0.8), TREE)
    for across, up in offsets[14:]:
        light = 0.95 + 0.25 * (up - 0.5 * across) / spread + rng.uniform(-0.12, 0.12)
        view.disc(x + across, height + up - 0.4, z, spread * rng.uniform(0.08, 0.2), shade(leaf, light), TREE)


CAR_PROFILES = (  # length and height of the outline from the rear bumper to the front one, in metres
    ((0, 0.35), (0, 0.95), (0.5, 1.45), (2.4, 1.5), (3.1, 0.98), (4.0, 0.85), (4.1, 0.35)),
    ((0, 0.35), (0.05, 0.92), (0.9, 0.98), (1.5, 1.42), (2.7, 1.42), (3.4, 0.95), (4.4, 0.8), (4.4, 0.35)),
    ((0, 0.35), (0, 1.1), (0.15, 1.9), (3.2, 1.95), (3.9, 1.1), (4.4, 1.0), (4.5, 0.35)),
)


def draw_car(
    view: View, rng: np.random.Generator, x: float, z: float, along: str, forwards: bool, haze: Colour
) -> None:
    """A car whose rear end (front end unless `forwards`) is at (x, z), pointing along axis "x" or "z"."""
    profile = CAR_PROFILES[rng.integers(len(CAR_PROFILES))]
    length, across, width = profile[-1][0], (z if along == "x" else x), 1.75
    start = x if along == "x" else z
    colour = mix(pick(rng, PAINTS), haze, min(0.5, z / 80))
    glass = mix(GLASS, haze, 0.25)

    def place(a: float, y: float, c: float) -> tuple[float, float, float]:
        a = start + (a if forwards else length - a)
        return (a, y, across + c) if along == "x" else (across + c, y, a)

    ends = (0.0, width)
    (view.shadow(x - 0.2, x + length + 0.2, z - 0.2, z + width, 120) if along == "x"
     else view.shadow(x - 0.2, x + width + 0.2, z - 0.2, z + length, 120))  # fmt: skip
    strips = list(zip(profile[:-1], profile[1:], strict=True))
    strips.sort(key=lambda strip: -sum(v * v for v in place((strip[0][0] + strip[1][0]) / 2, 0, width / 2)))
    for (a0, y0), (a1, y1) in strips:
        sloped = a1 != a0 and abs(y1 - y0) > 0.25
        quad = [place(a0, y0, 0), place(a0, y0, width), place(a1, y1, width), place(a1, y1, 0)]
        view.polygon(quad, glass if sloped else shade(colour, 1.12 if abs(a1 - a0) > 0.6 else 0.92), CAR)
    a_end = 0.0 if forwards else length
    lamp = (200, 44, 40) if forwards else (250, 240, 200)
    if along == "z":
        for c in ends:
            inner = c + (0.35 if c == 0 else -0.35)
            view.polygon([place(a_end, 0.7, c), place(a_end, 0.7, inner), place(a_end, 0.88, inner), place(a_end, 0.88, c)], lamp, CAR)
            view.polygon([place(a_end, 0, c), place(a_end, 0, inner), place(a_end, 0.36, inner), place(a_end, 0.36, c)], (34, 34, 38), CAR)
        if across < 0 < across + width:
            return
    near = 0.0 if along == "x" or across > 0 else width
    draw_car_side(view, lambda a, y: place(a, y, near), profile, shade(colour, 1.0 if along == "x" else 0.82), glass)


def draw_car_side(view: View, plane: Plane, profile: tuple, colour: Colour, glass: Colour) -> None:
    """The flank of a car: body, windows under the roof, two wheels."""
    view.polygon([plane(*point) for point in profile], colour, CAR)
    roof = max(y for _, y in profile)
    cabin = [(a, y) for a, y in profile if y > 0.9 and (y > roof - 0.1 or y < 1.2)]
    top = [(a, y) for a, y in cabin if y > roof - 0.1]
    left, right = top[0][0], top[-1][0]
    view.polygon([plane(left - 0.2, 1.0), plane(left + 0.1, roof - 0.1), plane(right - 0.1, roof - 0.1), plane(right + 0.4, 1.0)], glass, CAR)
    middle = (left + right) / 2
    view.panel(plane, middle - 0.05, middle + 0.05, 0.95, roof - 0.05, colour)
    for a in (0.8, profile[-1][0] - 0.85):
        for radius, tone in ((0.36, (34, 34, 38)), (0.2, (170, 172, 176))):
            wheel = [plane(a + radius * np.cos(t), 0.34 + radius * np.sin(t)) for t in np.arange(0, 6.28, 0.52)]
            view.polygon(wheel, tone, CAR)
