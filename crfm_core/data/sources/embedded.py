"""The embedded world: invented overhead scenes with labels, so that the whole chain runs with nothing to download.

A scene is drawn the way a landscape is laid out. Roads cut the ground into parcels; a parcel is a field, wood, bare ground, meadow or
a built-up block; water crosses it; trees and roofs stand on it and cast shadows; season, sun and haze colour the whole. What tells the
classes apart is colour and patterns of 4 px and more, so that it survives a small autoencoder.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from crfm_core.data.rasters import write_raster
from crfm_core.data.sources import ExpectedScenes, FoundScene, SceneSource
from crfm_core.files import seed_of
from crfm_core.settings import UNLABELLED

#: Classes of LoveDA in the order of its training ids (Wang et al., arXiv 2110.08733).
CLASSES = ("background", "building", "road", "water", "barren", "forest", "agriculture")
BACKGROUND, BUILDING, ROAD, WATER, BARREN, FOREST, AGRICULTURE = range(len(CLASSES))

METRES_PER_PIXEL = 0.3
CRS = "EPSG:32631"

Tints = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Country:
    """How a kind of country looks and is laid out; the defaults are home's.

    Colours are sRGB 0..255 under a clear noon sky, lengths pixels, pairs the ends of a uniform range.
    """

    grass: Tints = ((100, 128, 70), (148, 142, 94))  #: lush and dry, the two ends of a season
    crops: Tints = ((92, 142, 58), (118, 152, 72), (76, 116, 60), (140, 144, 80), (196, 178, 116), (184, 160, 92), (136, 106, 80))
    woods: Tints = ((42, 72, 40), (52, 82, 44), (78, 82, 44))
    soils: Tints = ((172, 142, 108), (190, 164, 132), (164, 124, 96))
    waters: Tints = ((38, 64, 80), (50, 82, 88), (72, 92, 84))
    roofs: Tints = ((168, 92, 70), (146, 76, 62), (88, 92, 102), (206, 202, 194), (92, 120, 152), (186, 148, 116))
    asphalt: Tints = ((104, 104, 110),)
    gravel: Tints = ((204, 190, 162),)
    paving: Tints = ((162, 158, 150),)
    cars: Tints = ((214, 214, 216), (60, 62, 70), (168, 52, 46), (66, 92, 140))
    gain: tuple[float, float] = (0.88, 1.1)  #: light
    haze: tuple[float, float] = (0, 0.16)
    sky: tuple[float, float, float] = (196, 204, 212)  #: colour of the haze
    urban: tuple[float, float] = (0.2, 0.7)  #: share of the free parcels that are built up
    parcel: float = 108  #: parcels are narrower than this
    block: float = 245  #: what is wider is cut by a road
    road: tuple[float, float] = (13, 18)
    track: tuple[float, float] = (12, 14)
    furrow: tuple[float, float] = (4.5, 7)
    crown: tuple[float, float] = (9, 11.5)
    lot: tuple[float, float] = (32, 44)
    house: tuple[float, float] = (9, 22)  #: half a side
    river: tuple[float, float] = (11, 17)  #: half its width
    pond: tuple[float, float] = (22, 36)  #: radius


#: The country that the scenes of the embedded world are of.
HOME = Country()


def other_country(seed: int) -> Country:
    """A country that follows from a seed, with colours, light and lengths from far wider ranges than home's.

    Every kind of ground has another hue, saturation and lightness than there, in one country of three any hue at all.
    """
    rng = np.random.default_rng(seed)
    anywhere = rng.random() < 1 / 3

    def recolour(colours: Tints) -> Tints:
        hue = rng.uniform(-0.5, 0.5) if anywhere else rng.normal(0, 0.05)
        saturation, lightness = np.exp(rng.normal(0, 0.35)), np.exp(rng.normal(0, 0.2))
        return tuple(_recoloured(colour, hue, saturation, lightness, rng) for colour in colours)

    def lengths(*pair: float) -> tuple[float, float]:
        middle, spread = scale * sum(pair) / 2 * np.exp(rng.normal(0, 0.2)), (pair[1] - pair[0]) / 2 / sum(pair) * 2
        return middle * (1 - spread), middle * (1 + spread)

    scale = np.exp(rng.uniform(-0.5, 0.4))
    kinds = ("grass", "crops", "woods", "soils", "waters", "roofs", "asphalt", "gravel", "paving", "cars")
    spans = ("road", "track", "furrow", "crown", "lot", "house", "river", "pond")
    parcel = scale * HOME.parcel * np.exp(rng.normal(0, 0.2))
    light = rng.uniform(0.7, 1.15)
    changes: dict[str, Any] = {name: recolour(getattr(HOME, name)) for name in kinds}
    changes |= {name: lengths(*getattr(HOME, name)) for name in spans}
    return Country(
        **changes,
        gain=(0.9 * light, 1.1 * light),
        haze=(0, rng.uniform(0, 0.35)),
        sky=tuple(rng.uniform(150, 235) + rng.normal(0, 12, 3)),
        urban=(0, rng.uniform(0.2, 1)),
        parcel=parcel,
        block=parcel * rng.uniform(1.6, 3),
    )


def _recoloured(
    colour: tuple[float, float, float], hue: float, saturation: float, lightness: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """A colour turned in hue (in turns), with other saturation and lightness, and a little noise of its own."""
    turned, vivid, light = colorsys.rgb_to_hsv(*(part / 255 for part in colour))
    rgb = colorsys.hsv_to_rgb((turned + hue) % 1, min(1, vivid * saturation + rng.uniform(0, 0.08)), min(1, light * lightness))
    red, green, blue = 255 * np.array(rgb) + rng.normal(0, 8, 3)
    return red, green, blue


class EmbeddedWorld(SceneSource):
    """Scenes that this module draws, so that the whole chain runs with nothing to download.

    Features: RGB scenes of fields, woods, water, roads and buildings at 0.3 m, another landscape for every scene, drawn from a seed.
    Format: GeoTIFF in EPSG:32631, ``<split>/<scene>.tif`` and ``<scene>_label.tif``.
    Classes: background, building, road, water, barren, forest, agriculture; every pixel has one.
    Splits: as many scenes as the configuration says, every split 20 km from the next.
    Licence: that of this package.
    Citation: none; the classes are those of LoveDA.
    """

    def find_scenes(self, out: Path) -> list[FoundScene]:
        """Draw the scenes into ``out``; those of a split lie in a row and never touch."""
        scenes = []
        for line, (split, count) in enumerate(self.settings.scenes.items()):
            for index in range(count):
                image, label = self._draw(out, split, index, line)
                scenes.append(FoundScene((image.stem,), image, label, image.relative_to(out), split))
        return scenes

    def find_unlabelled(self, out: Path) -> list[FoundScene]:
        """Draw the scenes without labels, in a row of their own beyond those of all splits."""
        scenes = []
        for index in range(self.settings.unlabelled or 0):
            image, _ = self._draw(out, UNLABELLED, index, len(self.settings.scenes), labelled=False)
            scenes.append(FoundScene((f"{index:03d}",), image, None, image.relative_to(out), UNLABELLED))
        return scenes

    def _draw(self, out: Path, split: str, index: int, line: int, labelled: bool = True) -> tuple[Path, Path]:
        """Draw one scene of a split, the ``line``-th; its image, and its label, which is written only if ``labelled``."""
        settings, name = self.settings, f"{split}-{index:03d}"
        place = self.dataset.name, split, index, settings.seed
        country = other_country(seed_of("country", *place)) if settings.country == "other" else HOME
        image, label = draw_scene(seed_of("scene", *place), settings.size, country)
        pitch = 2 * settings.size * METRES_PER_PIXEL
        corner = 400_000 + index * pitch, 5_000_000 + line * 20_000
        transform = METRES_PER_PIXEL, 0.0, corner[0], 0.0, -METRES_PER_PIXEL, corner[1]
        paths = out / split / f"{name}.tif", out / split / f"{name}_label.tif"
        for path, array in zip(paths, (image, label) if labelled else (image,), strict=False):
            write_raster(path, array, CRS, transform)
        return paths

    def expected(self, split: str) -> ExpectedScenes:
        return ExpectedScenes(self.settings.scenes[split], self.settings.size, "of scenes to draw")

    def expected_unlabelled(self) -> ExpectedScenes | None:
        return ExpectedScenes(self.settings.unlabelled or 0, self.settings.size, "of scenes to draw")


def draw_scene(seed: int, size: int = 256, country: Country = HOME) -> tuple[np.ndarray, np.ndarray]:
    """Draw the scene of a seed: image uint8 [size,size,3], label uint8 [size,size] with the ids of :data:`CLASSES`, every pixel set."""
    scene = _Scene(seed, size, country)
    scene.lay_out()
    scene.flood()
    scene.pave()
    scene.plant()
    scene.build()
    return scene.photograph(), scene.label


class _Scene:
    """The canvas: colours float [S,S,3], ids uint8 [S,S], heights in pixels of shadow, and gently bent ground coordinates u, v."""

    def __init__(self, seed: int, size: int, country: Country) -> None:
        self.country = country
        self.rng = np.random.default_rng(seed)
        self.size = size
        angle = self.rng.uniform(0, 2 * np.pi)
        self.sun = np.array([np.sin(angle), np.cos(angle)])  # direction towards the sun as (row, col), unit length
        self.gain = self.rng.uniform(*country.gain) * (1 + self.rng.normal(0, 0.025, 3))  # light per channel
        self.dry = self.rng.uniform()  # 0 lush .. 1 dry
        self.urban = self.rng.uniform(*country.urban)  # share of the free parcels that are built up
        self.haze = self.rng.uniform(*country.haze)
        self.colour = np.zeros((size, size, 3))
        self.label = np.full((size, size), BACKGROUND, np.uint8)
        self.height = np.zeros((size, size))
        self.rows, self.cols = np.mgrid[:size, :size] + 0.5
        self.angle = self.rng.uniform(0, np.pi)
        u, v = self.turned(self.angle)
        self.u, self.v = u + 5 * self.noise(120), v + 5 * self.noise(120)
        self.blotches = self.noise(24)

    def noise(self, wavelength: float) -> np.ndarray:
        """Smooth noise [S,S], mean 0, about unit variance, features of ``wavelength`` pixels."""
        points = int(self.size / wavelength * 2) + 4
        place = np.arange(self.size)[:, None] * 2 / wavelength + 1.5 - np.arange(points)
        weight = np.exp(-(place**2) / 0.9)
        weight /= np.sqrt((weight**2).sum(1, keepdims=True))
        return weight @ self.rng.normal(size=(points, points)) @ weight.T

    def turned(self, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates [S,S] in pixels from the centre along and across a direction."""
        x, y = self.cols - self.size / 2, self.rows - self.size / 2
        return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)

    def pick(self, colours: Tints, spread: float = 6.0) -> np.ndarray:
        """One of the colours, a little off."""
        return np.array(colours[self.rng.integers(len(colours))]) + self.rng.normal(0, spread) + self.rng.normal(0, spread / 2, 3)

    def fill(self, where: np.ndarray, colour: np.ndarray, pattern: np.ndarray | float = 0.0) -> None:
        """Paint ``colour`` plus ``pattern`` (grey levels) where ``where`` [S,S] is true or, as an opacity 0..1, in part."""
        spot = np.nonzero(where)  # most things cover little of the scene
        self._lay(spot, where[spot].astype(float), colour, np.broadcast_to(pattern, self.label.shape)[spot])

    def _lay(self, spot: tuple, alpha: np.ndarray, colour: np.ndarray, pattern: np.ndarray | float = 0.0) -> None:
        """:meth:`fill` for chosen pixels: ``alpha`` and ``pattern`` [n] belong to the n pixels of ``spot``."""
        under = self.colour[spot]
        self.colour[spot] = under + alpha[:, None] * (colour + np.broadcast_to(pattern, alpha.shape)[:, None] - under)

    def lay_out(self) -> None:
        """Cut the ground into parcels along roads and paint what grows or lies on each."""
        reach = 0.75 * self.size + 20
        self.parcels: list[tuple[float, float, float, float]] = []
        self.roads: list[tuple[str, str, float, float, float, float]] = []
        self._cut(-reach, reach, -reach, reach)
        self.cell = np.full(self.label.shape, -1)
        for index, (u0, u1, v0, v1) in enumerate(self.parcels):
            self.cell[(self.u >= u0) & (self.u < u1) & (self.v >= v0) & (self.v < v1)] = index
        area = np.bincount(self.cell[self.cell >= 0], minlength=len(self.parcels))
        self.fill(np.ones_like(self.label, bool), self.grass(), 5 * self.blotches)

        # The largest parcels get every kind at least once, so that every scene shows every class; the rest follows the scene's mix.
        kinds = ["field", "wood", "block", "bare", "block", "field"]
        self.rng.shuffle(kinds)
        rest = self.urban * np.array([0, 0, 1, 0, 0.25]) + (1 - self.urban) * np.array([0.42, 0.25, 0, 0.18, 0.15])
        names = ("field", "wood", "block", "bare", "meadow")
        self.wooded = np.zeros(self.label.shape, bool)
        self.blocks = []
        for index in np.argsort(-area, kind="stable"):
            if area[index] == 0:
                break
            kind = kinds.pop() if kinds else names[self.rng.choice(5, p=rest / rest.sum())]
            mask = self.cell == index
            if kind == "field":
                self._sow(mask)
            elif kind == "wood":
                self.wooded |= mask
            elif kind == "block":  # yards of grass and paving; the roofs follow in :meth:`build`
                self.blocks.append(index)
                self.fill(mask, self.grass(), 5 * self.blotches)
                self.fill(mask & (self.noise(45) > self.rng.uniform(-0.4, 0.8)), self.pick(self.country.paving), 3 * self.blotches)
            elif kind == "bare":
                self.fill(mask, self.pick(self.country.soils), 9 * self.blotches + 5 * self.noise(9))
                overgrown = mask & (self.noise(40) > 1.1)
                self.fill(overgrown, self.grass(), 4 * self.blotches)
                self.label[mask & ~overgrown] = BARREN
            else:
                self.fill(mask, self.grass() + self.rng.normal(0, 5), 6 * self.blotches)

    def _cut(self, u0: float, u1: float, v0: float, v1: float) -> None:
        """Halve a rectangle across its longer side until it is a parcel; the first cuts are roads, later ones tracks or mere borders."""
        long, across = u1 - u0 >= v1 - v0, max(u1 - u0, v1 - v0)
        if across < self.country.parcel:
            self.parcels.append((u0, u1, v0, v1))
            return
        kind, width = "border", 0.0
        if across > self.country.block:
            kind, width = "asphalt", self.rng.uniform(*self.country.road)
        elif self.rng.uniform() < 0.25:
            kind, width = "gravel", self.rng.uniform(*self.country.track)
        start, stop = (u0, u1) if long else (v0, v1)
        middle = start + across * self.rng.uniform(0.38, 0.62)
        if width:
            first, last = (v0, v1) if long else (u0, u1)
            self.roads.append((kind, "uv"[not long], middle, width, first, last))
        for low, high in ((start, middle - width / 2), (middle + width / 2, stop)):
            self._cut(*((low, high, v0, v1) if long else (u0, u1, low, high)))

    def grass(self) -> np.ndarray:
        lush, dry = map(np.array, self.country.grass)
        return lush + self.dry * (dry - lush) + self.rng.normal(0, 4, 3)

    def _sow(self, mask: np.ndarray) -> None:
        """A field or two of furrows; ripe and bare crops are likelier in a dry season."""
        parts = [mask]
        if mask.sum() > 4000 and self.rng.uniform() < 0.5:
            _, across = self.turned(self.angle + self.rng.normal(0, 0.25) + self.rng.integers(2) * np.pi / 2)
            side = across > np.median(across[mask])
            parts = [mask & side, mask & ~side]
        ripeness = np.array([3, 3, 3, 2, 1, 1, 1]) * (1 - self.dry) + np.array([1, 1, 1, 2, 3, 3, 2]) * self.dry
        for part in parts:
            crop = np.array(self.country.crops[self.rng.choice(len(self.country.crops), p=ripeness / ripeness.sum())]) + self.rng.normal(
                0, 6
            )
            skew = self.rng.normal(0, 0.5) if self.rng.uniform() < 0.3 else 0.0
            _, across = self.turned(self.angle + self.rng.integers(2) * np.pi / 2 + skew)
            wave = np.sin(2 * np.pi * (across + 1.2 * self.blotches) / self.rng.uniform(*self.country.furrow))
            tramline = np.exp(-(((across / 34 + self.rng.uniform()) % 1 - 0.5) ** 2) / 0.002)
            self.fill(part, crop, self.rng.uniform(9, 15) * wave - 14 * tramline + 5 * self.blotches)
        self.label[mask] = AGRICULTURE

    def flood(self) -> None:
        """A river from edge to edge, or ponds."""
        wobble = self.noise(70)
        along, across = self.turned(self.rng.uniform(0, np.pi))
        if self.rng.uniform() < 0.5:
            bend = 22 * np.sin(along / self.rng.uniform(38, 60) + self.rng.uniform(0, 6)) + self.rng.uniform(-0.25, 0.25) * self.size
            depth = self.rng.uniform(*self.country.river) + 3 * wobble - np.abs(across - bend)
        else:
            depth = np.full(self.label.shape, -np.inf)
            for _ in range(max(2, self.size * self.size // 40000)):
                row, col = self.rng.uniform(0.15, 0.85, 2) * self.size
                radius, stretch = self.rng.uniform(*self.country.pond), self.rng.uniform(0.7, 1.4)
                a, c = self.turned(self.rng.uniform(0, np.pi))
                a0, c0 = a[int(row), int(col)], c[int(row), int(col)]
                depth = np.maximum(depth, radius + 5 * wobble - np.hypot((a - a0) * stretch, (c - c0) / stretch))
        water = self.pick(self.country.waters)
        bank = np.clip(0.5 + depth / 2, 0, 1)
        self.fill(bank, water, 10 * np.exp(-np.maximum(depth, 0) / 3) + 3 * np.sin(across / 3 + 2 * wobble))
        self.label[depth > 0] = WATER
        self.wooded &= depth < -4

    def pave(self) -> None:
        """Tracks first, then roads over them, each with edges, centre line and some cars; roads bridge the water."""
        asphalt = self.pick(self.country.asphalt)
        for kind, axis, middle, width, low, high in sorted(self.roads, key=lambda road: road[0] == "asphalt"):
            off, run = (self.u - middle, self.v) if axis == "u" else (self.v - middle, self.u)
            spot = np.nonzero((np.abs(off) < width / 2 + 1) & (run > low) & (run < high))
            if not len(spot[0]):
                continue
            off, run, blotches = off[spot], run[spot], self.blotches[spot]

            cover = np.clip(width / 2 - np.abs(off) + 0.5, 0, 1)
            if kind == "gravel":
                self._lay(
                    spot,
                    cover,
                    np.array(self.country.gravel[0]) + self.rng.normal(0, 5),
                    8 * np.exp(-((np.abs(off) - 3) ** 2) / 1.5) + 4 * blotches,
                )
            else:
                self._lay(spot, cover, asphalt, 3 * blotches)
                self._lay(spot, 0.55 * cover * np.exp(-((np.abs(off) - width / 2 + 1.2) ** 2)), np.array([196.0, 194, 188]))
                self._lay(spot, 0.9 * np.exp(-(off**2) / 0.8) * ((run / 18) % 1 < 0.6), np.array([232.0, 230, 220]))
                for place in self.rng.uniform(low, high, int((high - low) / 110)):
                    lane = self.rng.choice([-1, 1]) * width / 4
                    car = np.clip(3.5 - np.abs(off - lane), 0, 1) * np.clip(7 - np.abs(run - place), 0, 1)
                    self._lay(spot, car, np.array(self.country.cars[self.rng.integers(len(self.country.cars))], float))
            covered = tuple(index[cover > 0.5] for index in spot)
            self.label[covered] = ROAD
            self.wooded[covered] = False

    def plant(self) -> None:
        """Crowns: domes around jittered points. A wood keeps every crown whose middle lies in it, so its edge is lobed."""
        step = self.rng.uniform(*self.country.crown)
        grid = np.arange(step / 2 - step, self.size + step, step)
        middles = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
        middles = middles + self.rng.uniform(-0.36, 0.36, middles.shape) * step
        pixels = middles.astype(int)
        pixels = pixels[((pixels >= 0) & (pixels < self.size)).all(1)]
        seeds = np.ones(self.label.shape, bool)
        seeds[tuple(pixels.T)] = False
        distance, nearest = ndimage.distance_transform_edt(seeds, return_indices=True)
        lone = np.zeros(self.label.shape, bool)
        lone[tuple(pixels.T)] = self.rng.uniform(size=len(pixels)) < 0.1
        open_ground = (self.label == BACKGROUND) & ~self.wooded
        crown = self.wooded | (lone[tuple(nearest)] & open_ground[tuple(nearest)])
        crown &= self.wooded[tuple(nearest)] | lone[tuple(nearest)]
        trees = crown & ((distance < 0.62 * step) | self.wooded) & (self.label == BACKGROUND)
        trees |= self.wooded[tuple(nearest)] & (distance < 0.55 * step) & np.isin(self.label, (BACKGROUND, BARREN, AGRICULTURE))

        dome = np.sqrt(np.clip(1.05 - (distance / (0.62 * step)) ** 2, 0, None))
        slope = np.stack(np.gradient(ndimage.gaussian_filter(dome, 1.0)))
        lit = -(slope * self.sun[:, None, None]).sum(0)
        tone = self.rng.normal(0, 7, self.label.shape)[tuple(nearest)]
        autumn = min(2, int(self.dry * 3 * self.rng.uniform(0.6, 1.0)))
        green = np.array(self.country.woods[autumn]) + self.rng.normal(0, 4, 3)
        self.fill(ndimage.gaussian_filter(trees.astype(float), 0.6), green, 20 * (dome - 0.6) + 85 * lit + tone)
        self.label[trees] = FOREST
        self.height[trees] = 4

    def build(self) -> None:
        """Roofs in rows of lots, flat or gabled, clear of roads, water and each other."""
        for index in self.blocks:
            u0, u1, v0, v1 = self.parcels[index]
            low, high = self.country.house
            lot = self.rng.uniform(*self.country.lot)
            palette = tuple(self.country.roofs[i] for i in self.rng.permutation(len(self.country.roofs))[:3])
            columns, lines = max(1, round((u1 - u0) / lot)), max(1, round((v1 - v0) / lot))
            for i in range(columns):
                for j in range(lines):
                    if self.rng.uniform() < 0.9:
                        wide, deep = (u1 - u0) / columns, (v1 - v0) / lines
                        half_wide, half_deep = self.rng.uniform(
                            low, np.maximum(low + 1, np.minimum(high, np.array([wide, deep]) / 2 - 3.5))
                        )
                        self._roof(u0 + (i + 0.5) * wide, v0 + (j + 0.5) * deep, half_wide, half_deep, palette)

    def _roof(self, cu: float, cv: float, a: float, b: float, palette: Tints) -> None:
        du, dv = self.u - cu, self.v - cv
        near = np.nonzero((np.abs(du) < a + 0.5) & (np.abs(dv) < b + 0.5))
        du, dv = du[near], dv[near]
        cover = np.clip(a - np.abs(du) + 0.5, 0, 1) * np.clip(b - np.abs(dv) + 0.5, 0, 1)
        roof = tuple(index[cover > 0.5] for index in near)
        if len(roof[0]) < 20 or np.isin(self.label[roof], (ROAD, WATER, BUILDING)).any():
            return
        sun_u = self.sun[1] * np.cos(self.angle) + self.sun[0] * np.sin(self.angle)
        sun_v = self.sun[0] * np.cos(self.angle) - self.sun[1] * np.sin(self.angle)
        across, sunny = (dv, sun_v) if a > b else (du, sun_u)
        shade = 3 * self.blotches[near]
        if self.rng.uniform() < 0.65:
            shade = shade + np.clip(across, -1, 1) * sunny * 24
        else:
            edge = np.minimum(a - np.abs(du), b - np.abs(dv))
            shade = shade + 16 * np.exp(-((edge - 1.5) ** 2))
        self._lay(near, cover, self.pick(palette), shade)
        self.label[roof] = BUILDING
        self.height[roof] = self.rng.uniform(5, 10)

    def photograph(self) -> np.ndarray:
        """Cast shadows, then light, haze, the blur of the optics and a little noise."""
        shadow = np.zeros(self.label.shape)
        for length in range(1, 11):
            down, right = np.round(-self.sun * length).astype(int)
            shadow = np.maximum(shadow, ndimage.shift((self.height >= length).astype(float), (down, right), order=0))
        shadow *= self.height < 1
        light = 1 - 0.45 * ndimage.gaussian_filter(shadow, 0.7)
        picture = self.colour * light[..., None] * self.gain
        picture += self.haze * (np.array(self.country.sky, float) - picture)
        picture = ndimage.gaussian_filter(picture, (0.6, 0.6, 0)) + self.rng.normal(0, 2, picture.shape)
        return np.clip(np.round(picture), 0, 255).astype(np.uint8)
