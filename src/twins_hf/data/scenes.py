"""A generated segmentation set, streets and rooms drawn by a seeded generator: training without a download.

A scene is a small world in metres, seen by a pinhole camera and painted from far to near. Walls, facades, sofas and
cars share most of their colours, so that shape, texture and place tell the classes apart and colour alone does not.
The classes bear names of the ADE20K benchmark, and masks follow it: 0 is unlabelled, 1 to 11 are `SCENE_CLASSES`.
"""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
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
GRAIN = np.array([2, 2, 3, 0.5, 3, 9, 1, 7, 1, 5, 1, 4], dtype=np.float32)  # surface noise by mask value, grey levels

DEEP_PAINTS = (
    *((88, 90, 98), (104, 128, 152), (70, 90, 128), (154, 82, 70), (72, 132, 134)),
    *((196, 108, 82), (214, 166, 88), (208, 152, 146), (150, 172, 136)),
)
PALE_PAINTS = ((236, 232, 224), (168, 164, 158), (170, 156, 192), (164, 194, 214), (232, 212, 176))
PAINTS = DEEP_PAINTS + PALE_PAINTS
GREENS = ((86, 128, 62), (112, 148, 74), (62, 104, 66), (142, 156, 78))
LEAVES = (*GREENS, *GREENS, (196, 146, 60), (186, 100, 62), (214, 150, 160))
STONES = ((198, 188, 174), (176, 174, 174), (206, 180, 158))
ASPHALTS = ((104, 104, 110), (124, 120, 118), (84, 86, 96))
WOODS = ((176, 130, 88), (146, 102, 68), (204, 168, 124), (116, 84, 64), (186, 172, 154))
SKIES = (  # zenith, horizon, tint of the light
    ((88, 150, 214), (204, 226, 238), (1.04, 1.02, 0.98)),
    ((120, 172, 222), (236, 238, 232), (1.02, 1.02, 1.00)),
    ((156, 168, 182), (220, 222, 222), (0.93, 0.95, 0.98)),
    ((110, 128, 186), (250, 200, 156), (1.06, 0.97, 0.88)),
    ((74, 86, 140), (232, 160, 158), (0.90, 0.84, 0.92)),
)
WHITE, GLASS, RUBBER, SHADOW, JOINT = (246, 242, 236), (74, 92, 112), (34, 34, 38), (20, 22, 40, 100), (50, 36, 30, 70)
CAR_OUTLINES = (  # metres from the near bumper and above the ground: hatchback, saloon, van
    ((0, 0.35), (0, 0.95), (0.4, 1.42), (2.4, 1.45), (3.1, 0.98), (4.0, 0.85), (4.1, 0.35)),
    ((0, 0.35), (0, 0.95), (0.8, 0.98), (1.4, 1.42), (2.7, 1.42), (3.4, 0.95), (4.2, 0.8), (4.2, 0.35)),
    ((0, 0.35), (0, 1.1), (0.15, 1.85), (3.0, 1.9), (3.7, 1.1), (4.1, 1.0), (4.2, 0.35)),
)
NEAR, FAR = 0.5, 1000.0  # metres

Colour = tuple[int, ...]  # red, green, blue in 0..255; a fourth number is the opacity
Point = tuple[float, float, float]  # metres to the right of the camera, above the ground, ahead
Plane = Callable[[float, float], Point]


def mix(first: Colour, second: Colour, amount: float) -> Colour:
    """The colour `amount` of the way from `first` (0) to `second` (1)."""
    return tuple(int(a + (b - a) * amount) for a, b in zip(first, second, strict=True))


def shade(colour: Colour, factor: float) -> Colour:
    """`colour` in `factor` times the light."""
    return tuple([min(255, int(value * factor)) for value in colour])


class Scene:
    """A camera with its picture and mask, both kept at twice the final size so that the picture comes out smooth.

    `horizon` and `vanish` are the vanishing point in fractions of height and width, `focal` is in widths, `eye` the
    height of the camera in metres. What is drawn with a label of None leaves the mask as it is.
    """

    def __init__(
        self, rng: np.random.Generator, size: tuple[int, int], horizon: float, vanish: float, focal: float, eye: float
    ):
        height, width = (2 * side for side in size)
        self.rng, self.horizon, self.vanish = rng, horizon * height, vanish * width
        self.focal, self.eye = focal * width, eye
        self.zenith, self.haze, self.light = SKIES[rng.integers(len(SKIES))]
        self.image, self.mask = Image.new("RGB", (width, height)), Image.new("L", (width, height))
        self.paint, self.veil = ImageDraw.Draw(self.image), ImageDraw.Draw(self.image, "RGBA")
        self.mark = ImageDraw.Draw(self.mask)

    def pick(self, colours: tuple[Colour, ...], distance: float = 0.0) -> Colour:
        """One of `colours`, a little changed, as it looks through the haze of `distance` metres."""
        red, green, blue = colours[self.rng.integers(len(colours))]
        warm, tone = self.rng.uniform(-12, 12), self.rng.uniform(0.84, 1.1)
        return mix(shade((red + warm, green, blue - warm), tone), self.haze, min(0.6, distance / 80))

    def project(self, point: Point) -> tuple[float, float]:
        x, y, z = point
        scale = self.focal / (z if z > NEAR else NEAR)
        return self.vanish + x * scale, self.horizon + (self.eye - y) * scale

    def polygon(self, points: list[Point], colour: Colour, label: int | None = None) -> None:
        corners = [self.project(point) for point in points]
        (self.paint if len(colour) == 3 else self.veil).polygon(corners, fill=colour)
        if label is not None:
            self.mark.polygon(corners, fill=label)

    def panel(
        self, plane: Plane, u0: float, u1: float, v0: float, v1: float, colour: Colour, label: int | None = None
    ) -> None:
        """A rectangle between two values of each coordinate of `plane`."""
        self.polygon([plane(u0, v0), plane(u1, v0), plane(u1, v1), plane(u0, v1)], colour, label)

    def joint(self, start: Point, end: Point) -> None:
        self.veil.line([self.project(start), self.project(end)], fill=JOINT)

    def disc(self, centre: Point, radius: float, colour: Colour, label: int) -> None:
        (column, row), size = self.project(centre), self.focal / centre[2] * radius
        self.paint.ellipse((column - size, row - size, column + size, row + size), fill=colour)
        self.mark.ellipse((column - size, row - size, column + size, row + size), fill=label)

    def box(self, x: tuple, y: tuple, z: tuple, colour: Colour, label: int) -> None:
        """A block between two values of each coordinate: its top, the side towards the camera, its front."""
        if y[1] < self.eye:
            self.panel(lambda u, v: (u, y[1], v), *x, *z, shade(colour, 1.12), label)
        if x[0] > 0 or x[1] < 0:
            side = x[0] if x[0] > 0 else x[1]
            self.panel(lambda u, v: (side, v, u), *z, *y, shade(colour, 0.78), label)
        self.panel(front_at(z[0]), *x, *y, colour, label)


def ground(x: float, z: float) -> Point:
    return x, 0.0, z


def front_at(z: float) -> Plane:
    return lambda x, y: (x, y, z)


def side_at(x: float) -> Plane:
    return lambda z, y: (x, y, z)


def draw_sky(scene: Scene) -> None:
    """A vertical gradient with soft clouds and, in every other scene, the glow of the sun."""
    rng, rows, columns = scene.rng, *np.mgrid[0:1:48j, 0:1:64j].astype(np.float32)
    zenith, haze = np.array(scene.zenith, dtype=np.float32), np.array(scene.haze, dtype=np.float32)
    colours = zenith + (haze - zenith) * np.minimum(1, rows * scene.image.height / scene.horizon)[..., None]
    clouds = np.zeros((48, 64), dtype=np.float32)
    for cells, weight in ((3, 0.6), (6, 0.3), (14, 0.2)):
        noise = Image.fromarray(rng.random((2 * cells, cells), dtype=np.float32))
        clouds += weight * np.asarray(noise.resize((64, 48), Image.Resampling.BICUBIC))
    cover = np.clip((clouds - rng.uniform(0.5, 0.75)) * 4, 0, 0.85)[..., None]
    colours += (0.4 * haze + 150 - colours) * cover
    distance = (columns - rng.uniform(0.2, 0.8)) ** 2 + (rows - rng.uniform(0.1, 0.35)) ** 2
    sun = rng.choice((0.0, 0.9)) / (1 + 160 * distance)
    colours += (np.array((255, 246, 214), dtype=np.float32) - colours) * sun[..., None]
    picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
    scene.image.paste(picture.resize(scene.image.size, Image.Resampling.BILINEAR))
    scene.mask.paste(SKY, (0, 0, *scene.mask.size))


def draw_ground(scene: Scene, left: float, right: float) -> None:
    """Paving slabs, and a road with kerbs, lane dashes and now and then a zebra crossing."""
    rng, slab = scene.rng, scene.rng.uniform(0.8, 1.3)
    scene.panel(ground, -80, 80, 1, FAR, scene.pick(STONES), SIDEWALK)
    for step in range(-10, 11):
        scene.joint((step * slab, 0, 1), (step * slab, 0, 24))
        scene.joint((-12, 0, 12 + step * slab), (12, 0, 12 + step * slab))
    scene.panel(ground, left - 0.25, right + 0.25, 1, FAR, (214, 210, 202), SIDEWALK)
    scene.panel(ground, left, right, 1, FAR, scene.pick(ASPHALTS), ROAD)
    middle, start, paint = (left + right) / 2, rng.uniform(1, 4), scene.pick(((240, 238, 228), (240, 214, 130)))
    for z in np.arange(start, 48, 4):
        scene.panel(ground, middle - 0.09, middle + 0.09, z, z + 1.8, paint)
    if rng.random() < 0.35:
        for x in np.arange(left + 0.3, right - 0.5, 1.0):
            scene.panel(ground, x, x + 0.5, start + 4, start + 6.5, WHITE)


def draw_facade(scene: Scene, plane: Plane, u0: float, u1: float, top: float, colour: Colour, style: int) -> None:
    """A front with courses of brick (style 0), bands (1) or wide panes (2); windows, awnings and a cornice."""
    rng, columns, near = scene.rng, max(1, int((u1 - u0) / 2.6)), plane(u0, 0)[2] < 18
    scene.panel(plane, u0, u1, 0, top, colour, BUILDING)
    if style == 0 and near:
        for v in np.arange(0.4, top, 0.4):
            scene.joint(plane(u0, v), plane(u1, v))
    pitch, wide, frame = (u1 - u0) / columns, (0.54, 0.5, 0.86)[style], shade(colour, 1.25)
    for base in range(0, int(top) - 2, 3):
        if style == 1 and base:
            scene.panel(plane, u0, u1, base - 0.12, base + 0.12, frame)
        for column in range(columns):
            left, low, high = u0 + (column + (1 - wide) / 2) * pitch, base + 0.8, base + 2.4
            low = 0.1 if base == 0 and column % 3 == 1 else low
            glass = (250, 214, 140) if rng.random() < 0.12 else shade(GLASS, rng.uniform(0.75, 1.5))
            if near:
                scene.panel(plane, left - 0.1, left + wide * pitch + 0.1, low - 0.1, high + 0.1, frame)
            scene.panel(plane, left, left + wide * pitch, low, high, glass)
    cloth = scene.pick(PAINTS)
    if near and style < 2 and rng.random() < 0.5:
        for stripe, u in enumerate(np.arange(u0, u1 - 0.5, 0.5)):
            scene.panel(plane, u, u + 0.5, 2.4, 3.0, cloth if stripe % 2 else WHITE)
    scene.panel(plane, u0, u1, top, top + 0.4, frame, BUILDING)


def draw_building(scene: Scene, x0: float, x1: float, z0: float, z1: float) -> None:
    """A house between two depths: its side along the street, then its front."""
    colour, top, style = scene.pick(PAINTS[3:], z0), 3.0 * scene.rng.integers(2, 6), int(scene.rng.integers(3))
    if x0 > 0 or x1 < 0:
        draw_facade(scene, side_at(x0 if x0 > 0 else x1), max(z0, 2.0), z1, top, shade(colour, 0.86), style)
    if z0 > 2:
        draw_facade(scene, front_at(z0), x0, x1, top, colour, style)


def draw_tree(scene: Scene, x: float, z: float) -> None:
    """A trunk, a canopy of overlapping discs, and dabs of leaves lit from the upper left."""
    rng, leaf, trunk = scene.rng, scene.pick(LEAVES, z), scene.pick(WOODS[1:4:2], z)
    top, spread, dabs = rng.uniform(3.4, 5.4), rng.uniform(1.3, 2.0), 12 + int(min(48, 450 / z))
    scene.panel(ground, x - spread, x + spread, z - 0.6, z + 0.6, SHADOW)
    scene.panel(front_at(z), x - 0.18, x + 0.18, 0, top, trunk, TREE)
    angles, reach = rng.uniform(0, 6.28, dabs), spread * np.sqrt(rng.random(dabs))
    across, up = np.cos(angles) * reach, np.sin(angles) * reach * 0.9
    light = 0.95 + 0.25 * (up - 0.5 * across) / spread + rng.uniform(-0.12, 0.12, dabs)
    sizes = rng.uniform(0.08, 0.2, dabs)
    light[:12], sizes[:12] = 0.8, 0.42
    for dab in zip(across.tolist(), up.tolist(), light.tolist(), sizes.tolist(), strict=True):
        scene.disc((x + dab[0], top + dab[1], z), spread * dab[3], shade(leaf, dab[2]), TREE)


def draw_car(scene: Scene, x: float, z: float) -> None:
    """A car along the street: its outline extruded, the far strips first, then lamps and tyres, then the flank."""
    outline = CAR_OUTLINES[scene.rng.integers(len(CAR_OUTLINES))]
    colour, glass = scene.pick((*DEEP_PAINTS[2:], WHITE), z), mix(GLASS, scene.haze, 0.2)
    right, back = x + 1.8, front_at(z)
    lamp = ((200, 44, 40), (252, 244, 210))[scene.rng.integers(2)]
    scene.panel(ground, x - 0.2, right + 0.2, z - 0.3, z + 4.5, SHADOW)
    for (a0, y0), (a1, y1) in reversed(list(zip(outline[:-1], outline[1:], strict=True))):
        tone = glass if y1 > 1.3 and y1 - y0 > 0.25 else shade(colour, 1.15 if abs(y1 - y0) < 0.2 else 0.95)
        scene.polygon([(x, y0, z + a0), (right, y0, z + a0), (right, y1, z + a1), (x, y1, z + a1)], tone, CAR)
    for left in (x, right - 0.35):
        scene.panel(back, left, left + 0.35, 0.0, 0.36, RUBBER, CAR)
        scene.panel(back, left, left + 0.35, 0.68, 0.86, lamp)
    scene.panel(back, x + 0.62, x + 1.18, 0.5, 0.68, WHITE)
    if z < 25 and (x > 0 or right < 0):
        flank = side_at(x if x > 0 else right)
        scene.polygon([flank(z + a, y) for a, y in outline], shade(colour, 0.8), CAR)
        roof = [(a, y - 0.1) for a, y in outline if y > 1.3]
        panes = [(roof[0][0] - 0.2, 1.0), *roof, (roof[-1][0] + 0.35, 1.0)]
        scene.polygon([flank(z + a, y) for a, y in panes], shade(glass, 0.9))
        for a, radius, tone in ((0.8, 0.36, RUBBER), (0.8, 0.18, WHITE), (3.3, 0.36, RUBBER), (3.3, 0.18, WHITE)):
            rim = [(a + radius * np.cos(turn), 0.34 + radius * np.sin(turn)) for turn in np.arange(0, 6.28, 0.6)]
            scene.polygon([flank(z + u, y) for u, y in rim], tone, CAR)


def draw_bin(scene: Scene, x: float, z: float) -> None:
    """A bin or an advertising pillar, not labelled."""
    colour, width, top = scene.pick(PAINTS, z), scene.rng.uniform(0.5, 1.0), scene.rng.uniform(0.9, 2.2)
    scene.panel(ground, x - 0.1, x + width + 0.2, z - 0.1, z + width, SHADOW)
    scene.box((x, x + width), (0, top), (z, z + width), colour, UNLABELLED)
    scene.panel(front_at(z), x + 0.1, x + width - 0.1, 0.55 * top, top - 0.1, shade(colour, 1.3))


def draw_street(scene: Scene) -> None:
    """A street to its far end: sky, ground, houses on both sides, then trees, cars and bins along the kerbs."""
    rng, middle, half, walk = scene.rng, *scene.rng.uniform((-2.0, 2.6, 3.5), (2.0, 3.4, 5.0))
    draw_sky(scene)
    draw_ground(scene, middle - half, middle + half)
    houses, things = [(50.0, -14.0, 14.0, 60.0)], []
    for side in (-1, 1):
        kerb, z = middle + side * half, rng.uniform(1, 7)
        front = kerb + side * walk
        while z < 45:
            depth, far = rng.uniform(6, 14), front + side * rng.uniform(8, 14)
            if rng.random() < 0.85:
                houses.append((z, min(front, far), max(front, far), z + depth))
            else:
                things += [(draw_tree, front + side * rng.uniform(0, 4), z + k) for k in (2, 4, 6)]
            z += depth + rng.choice((0.0, 0.0, 2.5))
        for z in np.arange(rng.uniform(6, 12), 36, rng.uniform(9, 14)):
            things.append((draw_tree, kerb + side * 0.8, z))
            if rng.random() < 0.45:
                things.append((draw_bin, kerb + side * rng.uniform(0.6, 1.4) - 0.4, z + 2.5))
        for z in np.arange(rng.uniform(4.5, 8), 22, rng.uniform(6.5, 11)):
            if rng.random() < 0.75:
                things.append((draw_car, kerb - side * 1.2 - 0.9, z))
    for z0, x0, x1, z1 in sorted(houses, reverse=True):
        draw_building(scene, x0, x1, z0, z1)
    for draw, x, z in sorted(things, key=lambda thing: -thing[2]):
        draw(scene, x, z)


def draw_floor(scene: Scene, left: float, right: float, back: float) -> None:
    """Planks that run to the back wall."""
    rng, colour, width = scene.rng, scene.pick(WOODS), scene.rng.uniform(0.22, 0.4)
    scene.panel(ground, left, right, NEAR, back, colour, FLOOR)
    for x in np.arange(left, right, width):
        joints = [back, *np.arange(back - rng.uniform(0.3, 1.5), NEAR, -1.2), NEAR]
        for far, near in zip(joints[:-1], joints[1:], strict=True):
            scene.panel(ground, x, min(x + width, right), near, far, shade(colour, rng.uniform(0.86, 1.12)))
        scene.joint((x, 0, NEAR), (x, 0, back))


def draw_wall(scene: Scene, plane: Plane, u0: float, u1: float, top: float, colour: Colour, style: int) -> None:
    """Plain paint (style 0), striped paper (1) or a panelled lower half (2), above a skirting board."""
    scene.panel(plane, u0, u1, 0, top, colour, WALL)
    if style == 1:
        for u in np.arange(u0, u1 - 0.2, 0.4):
            scene.panel(plane, u, u + 0.2, 0, top, shade(colour, 1.1))
    if style == 2:
        scene.panel(plane, u0, u1, 0, 0.95, mix(colour, WHITE, 0.6))
        scene.panel(plane, u0, u1, 0.92, 1.0, shade(colour, 0.8))
    scene.panel(plane, u0, u1, 0, 0.12, WHITE)


def draw_window(scene: Scene, plane: Plane, u: float) -> None:
    """A casement with a view of sky and hills, sometimes between curtains, which are not labelled."""
    rng, right, low, high = scene.rng, u + scene.rng.uniform(1.3, 2.1), scene.rng.uniform(0.6, 0.9), 2.25
    frame, cloth = mix(scene.pick(WOODS), WHITE, rng.choice((0.3, 0.9))), scene.pick(PAINTS)
    scene.panel(plane, u, right, low, high, frame, WINDOW)
    for v in np.linspace(low + 0.07, high - 0.07, 10)[:-1]:
        sky = mix(scene.haze, scene.zenith, (v - low) / (high - low))
        scene.panel(plane, u + 0.07, right - 0.07, v, high - 0.07, sky)
    ridge = [(x, low + rng.uniform(0.2, 0.5)) for x in np.linspace(u + 0.07, right - 0.07, 9)]
    hills = [(right - 0.07, low + 0.07), (u + 0.07, low + 0.07), *ridge]
    scene.polygon([plane(*point) for point in hills], scene.pick(GREENS, 15))
    for bar in np.linspace(u, right, 4 if right - u > 1.5 else 3)[1:-1]:
        scene.panel(plane, bar - 0.03, bar + 0.03, low, high, frame)
    scene.panel(plane, u - 0.08, right + 0.08, low - 0.08, low, shade(frame, 0.9), WINDOW)
    if rng.random() < 0.45:
        for fold in range(5):
            for left in (u - 0.3 + fold * 0.08, right - 0.1 + fold * 0.08):
                scene.panel(plane, left, left + 0.08, 0.15, 2.4, shade(cloth, 0.9 + 0.1 * (fold % 3)), UNLABELLED)


def draw_picture(scene: Scene, plane: Plane, u: float) -> None:
    """A framed picture, not labelled."""
    right, low, high = scene.rng.uniform((u + 0.5, 1.3, 1.9), (u + 1.0, 1.5, 2.2))
    scene.panel(plane, u, right, low, high, scene.pick(WOODS), UNLABELLED)
    scene.panel(plane, u + 0.06, right - 0.06, low + 0.06, high - 0.06, scene.pick(PAINTS))
    scene.panel(plane, u + 0.06, right - 0.06, low + 0.06, low + 0.3, scene.pick(PAINTS))


def draw_sofa(scene: Scene, x: float, right: float, back: float) -> None:
    """A back, seats with cushions, two arms."""
    rng, colour, front, top = scene.rng, scene.pick(DEEP_PAINTS[1:]), back - 0.9, scene.rng.uniform(0.8, 1.0)
    scene.panel(ground, x - 0.15, right + 0.15, front - 0.25, back, SHADOW)
    scene.box((x, right), (0.1, top), (back - 0.3, back), colour, SOFA)
    seats = np.linspace(x + 0.22, right - 0.22, 4 if right - x > 1.9 else 3)
    for left, end in zip(seats[:-1], seats[1:], strict=True):
        scene.box((left + 0.02, end - 0.02), (0.46, top - 0.06), (back - 0.42, back - 0.3), shade(colour, 1.04), SOFA)
        scene.box((left, end), (0.1, 0.34), (front, back - 0.42), shade(colour, 0.94), SOFA)
        scene.box((left + 0.02, end - 0.02), (0.34, 0.5), (front - 0.02, back - 0.42), shade(colour, 1.06), SOFA)
        if rng.random() < 0.5:
            scene.box((left + 0.1, left + 0.5), (0.5, 0.82), (back - 0.56, back - 0.46), scene.pick(PAINTS), SOFA)
    for left in (x, right - 0.22):
        scene.box((left, left + 0.22), (0.1, 0.64), (front, back), colour, SOFA)


def draw_plant(scene: Scene, x: float, z: float) -> None:
    """A house plant in its pot, not labelled."""
    leaf = scene.pick(GREENS)
    for across, up, tone in scene.rng.uniform((-0.45, 0.7, 0.75), (0.45, 1.4, 1.2), (14, 3)):
        blade = [(x, 0.3), (x + across / 2 + 0.08, up * 0.75), (x + across, up), (x + across / 2 - 0.06, up * 0.75)]
        scene.polygon([(*point, z) for point in blade], shade(leaf, tone), UNLABELLED)
    pot = [(x - 0.16, 0, z), (x + 0.16, 0, z), (x + 0.22, 0.4, z), (x - 0.22, 0.4, z)]
    scene.polygon(pot, scene.pick(PAINTS), UNLABELLED)


def draw_room(scene: Scene) -> None:
    """A room towards its back wall: ceiling, floor, side walls, back wall with windows and pictures, plant, sofa."""
    rng, left, right, back, top = scene.rng, *scene.rng.uniform((-2.6, 1.6, 3.6, 2.6), (-1.6, 2.6, 4.6, 2.9))
    paint, style = scene.pick(DEEP_PAINTS[4:] + PALE_PAINTS[1:]), int(rng.integers(3))
    colour = mix(paint, WHITE, rng.uniform(0.15, 0.5))
    scene.panel(lambda x, z: (x, top, z), left, right, NEAR, back, mix(colour, (236, 234, 230), 0.75), CEILING)
    draw_floor(scene, left, right, back)
    for x, light in ((left, 0.84), (right, 0.9)):
        draw_wall(scene, side_at(x), NEAR, back, top, shade(colour, light), style)
        if rng.random() < 0.6:
            draw_window(scene, side_at(x), rng.uniform(1.6, 2.4))
    draw_wall(scene, front_at(back), left, right, top, colour, style)
    u = left + rng.uniform(0.3, 0.6)
    while u < right - 1.2:
        wide = u < right - 2.2 and rng.random() < 0.55
        (draw_window if wide else draw_picture)(scene, front_at(back), u)
        u += 2.6 if wide else 1.3
    if rng.random() < 0.6:
        draw_plant(scene, rng.choice((left + 0.5, right - 0.5)), back - 0.4)
    x, width = rng.uniform((left + 0.2, 1.6), (right - 2.4, 2.2))
    draw_sofa(scene, x, x + width, back - rng.uniform(0.05, 0.8))
    scene.light = tuple((1 + channel) / 2 for channel in scene.light)  # walls take half of the sky's tint


def photograph(scene: Scene, mask: np.ndarray) -> Image.Image:
    """What light and camera add: a tint, a ramp of light over the scene, grain of the surfaces and sensor, blur."""
    rng, (height, width) = scene.rng, mask.shape
    ramp = np.linspace(-1, 1, width, dtype=np.float32) * np.float32(rng.uniform(-0.14, 0.14))
    fall = np.linspace(-1, 1, height, dtype=np.float32)[:, None] * np.float32(rng.uniform(-0.1, 0.1))
    pixels = np.asarray(scene.image.reduce(2)) * ((1 + ramp + fall)[..., None] * np.array(scene.light, np.float32))
    grain = rng.standard_normal((height, width), dtype=np.float32) * (GRAIN[mask] + np.float32(rng.uniform(0.5, 3.5)))
    image = Image.fromarray(np.clip(pixels + grain[..., None], 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6))) if rng.random() < 0.3 else image


def unlabel_borders(mask: np.ndarray, rng: np.random.Generator) -> None:
    """Blank, in place, the borders between some pairs of classes, one pixel wide, as annotators leave them."""
    loose = rng.random((len(SCENE_CLASSES) + 1,) * 2) < 0.25
    np.fill_diagonal(loose, False)
    across, down = loose[mask[:, :-1], mask[:, 1:]], loose[mask[:-1], mask[1:]]
    mask[:, :-1][across] = UNLABELLED
    mask[:-1][down] = UNLABELLED


def draw_scene(seed: int, index: int, image_size: tuple[int, int] = (192, 256)) -> tuple[Image.Image, Image.Image]:
    """Draw one street or room.

    Args:
        seed, index: what the scene depends on; both 0 or more.
        image_size: (height, width) in pixels, from 64 up; each side varies by a tenth, one scene in seven is turned.

    Returns:
        An RGB image and a mask of the same size (mode "L"): 0 unlabelled, 1 to 11 the class of `SCENE_CLASSES` plus 1.

    Raises:
        ValueError: where seed or index is negative, or a side is below 64; it names the argument and its value.
    """
    check_at_least(0, seed=seed, index=index)
    check_at_least(64, height=image_size[0], width=image_size[1])
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    size = [round(side * rng.uniform(0.9, 1.1)) for side in image_size]
    size = size[::-1] if rng.random() < 0.15 else size
    if rng.random() < 0.5:
        scene = Scene(rng, size, *rng.uniform((0.42, 0.35, 0.65, 1.7), (0.56, 0.65, 0.85, 2.6)))
        draw_street(scene)
    else:
        scene = Scene(rng, size, *rng.uniform((0.37, 0.35, 0.60, 1.3), (0.48, 0.65, 0.80, 1.6)))
        draw_room(scene)
    mask = np.asarray(scene.mask)[::2, ::2].copy()
    image = photograph(scene, mask)
    unlabel_borders(mask, rng)
    return image, Image.fromarray(mask)


def generate_scenes(split: str, count: int, seed: int, image_size: tuple, code: str) -> Iterator[dict]:
    """The rows of a split: even indices for training, odd ones for validation. `code` only tells caches apart."""
    for number in range(count):
        image, label = draw_scene(seed, 2 * number + (split == "validation"), image_size)
        yield {"image": as_png(image), "label": as_png(label), "file_name": f"scene_{split}_{number:05d}.png"}


def as_png(picture: Image.Image) -> dict:
    """The picture as `datasets` stores it; at the default compression, encoding would take as long as drawing."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def load_scenes(
    num_train: int = 240,
    num_validation: int = 40,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    image_size: tuple[int, int] = (192, 256),
) -> datasets.DatasetDict:
    """The generated set, drawn once and then read from the cache of `datasets`.

    Args:
        num_train, num_validation: scenes in each split, 1 or more.
        seed: the set depends on it alone; a larger set begins with the scenes of a smaller one.
        cache_dir: where `datasets` keeps it; its own default place for None. Changed drawing code draws it anew.
        image_size: see `draw_scene`.

    Returns:
        Splits "train" and "validation" with columns `image`, `label` (a mask as of `draw_scene`) and `file_name`.

    Raises:
        ValueError: where an argument is out of range; it names the argument and its value.
    """
    check_at_least(1, num_train=num_train, num_validation=num_validation)
    check_at_least(0, seed=seed)
    check_at_least(64, height=image_size[0], width=image_size[1])
    columns = {"image": datasets.Image(), "label": datasets.Image(), "file_name": datasets.Value("string")}
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    splits = {}
    for split, count in (("train", num_train), ("validation", num_validation)):
        drawing = {"split": split, "count": count, "seed": seed, "image_size": tuple(image_size), "code": code}
        splits[split] = datasets.Dataset.from_generator(
            generate_scenes,
            features=datasets.Features(columns),
            cache_dir=None if cache_dir is None else str(cache_dir),
            gen_kwargs=drawing,
            split=datasets.NamedSplit(split),
        )
    return datasets.DatasetDict(splits)


def check_at_least(minimum: int, **arguments: int) -> None:
    """Raise a ValueError that names the argument, its value and what is allowed."""
    for name, value in arguments.items():
        if not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
