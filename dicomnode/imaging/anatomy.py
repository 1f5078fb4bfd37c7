"""The anatomy of a chest CT by formula: a phantom, no patient's image.

Coordinates are LPS in mm about the centre of the chest: x to the patient's left, y to the back,
z to the head. A shape is a signed distance in mm, negative inside; painting it over what lies
behind blends by the part of each voxel that it covers. Everything follows from the seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from dicomnode.imaging.shapes import (
    Field,
    Rods,
    Voxels,
    ball,
    barrel,
    blur,
    covers,
    cut,
    join,
    paint,
    rod,
    textures,
    tree,
)

AIR, LUNG, FAT, BLOOD, MUSCLE, LIVER = -1000.0, -868.0, -102.0, 42.0, 56.0, 62.0
RIB_STEP_MM, RIB_DROP_MM = 25.0, 105.0


NODULES: Final = (
    ((-88.0, 34.0, 12.0), 4.0, 35.0),
    ((78.0, -52.0, 18.0), 2.6, 60.0),
    ((96.0, 20.0, -2.0), 3.0, 30.0),
    ((-60.0, -48.0, 24.0), 7.0, -620.0),  # ground glass
)
"""Centre in mm, radius in mm, HU."""


@dataclass(frozen=True, slots=True, eq=False)
class _Slice:
    """A slice to paint, and what its organs need to know of every voxel."""

    image: Field  # HU, painted in place
    plain: tuple[Field, Field]  # x, y of the couch, mm
    x: Field  # of the atlas, mm
    y: Field
    z: float
    cavity: Field  # distance to the inside of the rib cage, mm
    angle: Field  # about the chest, 0 at the spine, pi at the breastbone
    fine: Field  # grain of 2.5 mm
    coarse: Field  # grain of 9 mm

    def fill(self, part: Field, hu: Field | float) -> None:
        paint(self.image, part, hu)

    def bone(self, distance: Field, cortex_mm: float, cortex: float, marrow: Field) -> None:
        """A shell of cortical bone about trabecular bone."""
        self.fill(covers(distance), cortex)
        self.fill(covers(distance + cortex_mm, 1.6), marrow)


@dataclass(frozen=True, slots=True, eq=False)
class _Trees:
    vessels: Rods
    bronchi: Rods


def chest(positions_z: Sequence[float], matrix: int, spacing_mm: float, seed: int) -> Voxels:
    """Draw the chest at the given heights.

    Args:
        positions_z: height of each slice in mm; -45 cuts liver and stomach, +45 the trachea.
        matrix: rows and columns.
        spacing_mm: distance of rows and of columns.
        seed: of vessels and textures.

    Returns:
        (slices, rows, columns), float32, HU from -1000 to about 800, without noise.
    """
    rng = np.random.default_rng(seed)
    axis = ((np.arange(matrix) - (matrix - 1) / 2) * spacing_mm).astype(np.float32)
    x, y = np.broadcast_arrays(axis[None, :], axis[:, None])
    trees = _lung_trees(rng)
    grain = textures(rng, matrix, spacing_mm)
    return np.stack([_axial(x, y, float(z), trees, next(grain)) for z in positions_z])


def _axial(x: Field, y: Field, z: float, trees: _Trees, grain: Field) -> Voxels:
    """One slice, painted from the outside in."""
    image = np.full(x.shape, AIR, np.float32)
    wx, wy = _warped(x, y, z)
    angle = np.arctan2(np.abs(wx), wy + 4)
    s = _Slice(image, (x, y), wx, wy, z, _cavity(wx, wy, z), angle, grain[0], grain[1])
    _couch(s)
    _chest_wall(s)
    _mediastinum(s)
    _lungs(s, trees)
    _abdomen(s)
    _great_vessels(s)
    _ribs(s)
    _spine(s)
    _sternum(s)
    _scapulae(s)
    return blur(image, 0.75)


# --- outlines that several organs share ---------------------------------------------------------
def _warped(x: Field, y: Field, z: Field | float) -> tuple[Field, Field]:
    """The point in the atlas for a point in the chest: nobody is made of ellipses."""
    wx = x + 3.0 * np.sin(y / 41 + z / 70) + 1.5 * np.sin(x / 23 + y / 31 + 1 + z / 50)
    wy = y + 2.5 * np.sin(x / 47 + 0.7 + z / 80) + 1.5 * np.sin(x / 29 - y / 37 + z / 60)
    return wx.astype(np.float32), wy.astype(np.float32)


def _body(x: Field, y: Field, z: Field | float) -> Field:
    """The skin: flat on the couch, hollow over the spine and the breastbone, full in front."""
    body = barrel(x, y - 2, 161 - 0.1 * z, 112 - 0.03 * z)
    for side in (-1, 1):
        body = join(body, ball((x, y), (side * 70, -84), (58, 33)), 16)
    body = join(body, ball((x, y), (0, 60), (118, 61)), 20)
    hollow = np.where(y > 0, 5 * np.exp(-((x / 11) ** 2)), 7 * np.exp(-((x / 24) ** 2)))
    return -join(-(body + hollow), 117 - y, 12)


def _cavity(x: Field, y: Field, z: Field | float) -> Field:
    """Inside the rib cage, which widens towards the feet."""
    return barrel(x, y + 4, 127 - 0.1 * z, 84 - 0.06 * z)


def _heart(x: Field, y: Field, z: Field | float) -> Field:
    return join(
        ball((x, y, z), (22, -34, -28), (58, 42, 44)),
        ball((x, y, z), (-6, -28, -12), (40, 36, 40)),
        14,
    )


def _midline(x: Field, y: Field, z: Field | float) -> Field:
    """All that lies between the lungs: heart, great vessels, spine, hila."""
    ahead = np.clip((y + 75) / 60, 0, 1)
    width = 13 + 8 / (1 + np.exp(-z / 8))
    column = np.abs(x - 3) - (5 + width * ahead * ahead * (3 - 2 * ahead))
    shape = join(column, ball((x, y), (0, 62), (29, 28)), 12)
    shape = join(shape, _heart(x, y, z) - 5, 10)
    shape = join(shape, ball((x, y), (24, 42), (15, 15)), 6)
    for side in (-1, 1):
        shape = join(shape, ball((x, y, z), (side * 34, 2, 8), (14, 15, 20)), 10)
    return join(shape, ball((x, y, z), (-4, -26, 30), (34, 24, 34)), 10)


def _right_dome(x: Field, y: Field, z: Field | float) -> Field:
    return ball((x, y, z), (-62, -4, -84), (84, 86, 72))


def _left_dome(x: Field, y: Field, z: Field | float) -> Field:
    return ball((x, y, z), (74, 8, -92), (74, 80, 68))


def _lung(x: Field, y: Field, z: Field | float) -> Field:
    """Both lungs: the cavity less what lies between and below."""
    inner = join(_midline(x, y, z), _right_dome(x, y, z), 4)
    inner = join(inner, _left_dome(x, y, z), 4)
    return -join(-(_cavity(x, y, z) + 2.0), inner, 9)


# --- organs -------------------------------------------------------------------------------------
def _couch(s: _Slice) -> None:
    """The couch: a foam core in a carbon skin, and the mattress on it."""
    x, y = s.plain
    sag = 137.0 - 30 * (x / 180) ** 2
    s.fill(covers(np.abs(y - sag + 9) - 8), -930)
    s.fill(covers(np.maximum(np.abs(y - sag - 11) - 11, np.abs(x) - 172)), -965)
    for offset in (0.0, 22.0):
        s.fill(covers(np.maximum(np.abs(y - sag - offset) - 0.9, np.abs(x) - 172)), -420)


def _chest_wall(s: _Slice) -> None:
    """Skin, fat under it, the muscles of the wall with fat between them."""
    x, y, z = s.x, s.y, s.z
    body = _body(x, y, z)
    s.fill(covers(body), 25)
    s.fill(covers(body + 2.2), FAT + 7 * s.fine + 5 * s.coarse)
    septum = covers(np.abs(s.coarse + 0.25 * s.fine) - 0.03, 0.1) * covers(body + 3)
    s.fill(0.3 * septum, -20)
    streak = covers(np.abs(s.coarse + 0.3 * s.fine) - 0.07, 0.2)
    tissue = MUSCLE + 6 * s.fine - 70 * streak
    outer = np.full_like(x, 12.5)
    for middle, width, thick in (
        (0.62, 0.42, 15 + 0.10 * z),
        (1.34, 0.26, 9 - 0.06 * z),
        (2.28, 0.5, 12 + 0.2 * z),
    ):  # latissimus and the muscles of the shoulder blade; serratus; pectorals
        outer += max(thick, 3.0) * covers((np.abs(s.angle - middle) - width) * 60, 14)
    muscle = np.maximum(s.cavity - outer, body + 5)
    s.fill(covers(muscle, 1.2), tissue)
    for depth in (12.5, 19 + 2 * np.sin(3 * s.angle + z / 25)):
        plane = np.abs(s.cavity - depth - 0.4 * s.coarse) - 0.8 - 0.2 * s.fine
        s.fill(0.9 * covers(np.maximum(plane, muscle + 1), 1.5), FAT)
    s.fill(covers(s.cavity + 1), FAT)


def _mediastinum(s: _Slice) -> None:
    """Fat between the lungs, with the heart in its pericardium."""
    x, y, z = s.x, s.y, s.z
    inside = covers(np.maximum(_midline(x, y, z) - 2, s.cavity + 1))
    s.fill(inside, FAT + 6 + 8 * s.fine)
    heart = _heart(x, y, z)
    s.fill(0.7 * inside * covers(np.abs(heart + 1.5) - 0.6), 20)
    myocardium = heart + 5.5 + 1.6 * np.sin(np.arctan2(y + 30, x - 18) * 5 + z / 9)
    s.fill(inside * covers(myocardium, 1.5), 48 + 3 * s.fine)
    for centre, radii in (((38, -40, -28), (30, 22, 30)), ((-22, -30, -22), (20, 22, 30))):
        s.fill(inside * covers(ball((x, y, z), centre, radii), 4), BLOOD - 3)
    groove = np.abs(x + 4 - 0.5 * (y + 30) + 5 * np.sin(y / 14)) - 2.5
    groove = np.maximum(groove, -np.abs(heart + 10) + 5)
    s.fill(0.6 * inside * covers(np.maximum(groove, heart + 3), 3) * float(z < 5), FAT + 30)


def _lungs(s: _Slice, trees: _Trees) -> None:
    """Parenchyma, denser where the patient lies on it; fissures, bronchi, vessels, nodules."""
    x, y, z = s.x, s.y, s.z
    lung = _lung(x, y, z)
    inside = covers(lung, 1.4)
    parenchyma = LUNG + 0.32 * (y + 20) + 22 * s.fine + 14 * s.coarse
    parenchyma += 90 * np.exp(-((np.minimum(lung, 0) / 2.0) ** 2))
    s.fill(inside, parenchyma)
    for side in (-1, 1):
        fissure = np.abs(y - (18 - 0.9 * z) - 10 * np.sin(x / 26 + side)) - 0.5
        s.fill(0.16 * inside * covers(np.maximum(fissure, -side * x), 1.4), -100)
    for centre, radius, hu in NODULES:
        part = covers(ball((x, y, z), centre, (radius,) * 3) + 0.5 * s.fine, 1.5)
        s.fill(part * inside, hu)
    s.fill(cut(trees.vessels, *s.plain, z) * inside, BLOOD)
    free = 1 - covers(_heart(x, y, z) - 1)
    s.fill(cut(trees.bronchi, *s.plain, z, wider=0.2) * free, -120)
    s.fill(cut(trees.bronchi, *s.plain, z) * free, AIR + 15)


def _abdomen(s: _Slice) -> None:
    """What the domes of the diaphragm bring into the chest: liver; stomach, spleen and fat."""
    x, y, z = s.x, s.y, s.z
    wall = s.cavity + 3
    right, left = np.maximum(_right_dome(x, y, z), wall), np.maximum(_left_dome(x, y, z), wall)
    for dome in (right, left):
        s.fill(covers(dome), 45)
    s.fill(covers(right + 2.5), LIVER + 3 * s.coarse)
    s.fill(covers(left + 2.5), 48 + 3 * s.coarse)
    spleen = ball((x, y), (98, 40), (30, 40))
    stomach = ball((x, y), (60, -20), (32, 34))
    between = np.minimum(spleen, stomach) - 1
    s.fill(covers(np.maximum(-between, left + 6), 2), FAT + 5 * s.fine)
    s.fill(covers(np.maximum(stomach + 3, left + 6), 2), 20)
    gas = np.maximum(stomach + 4, y + 32 + 0.02 * x)
    s.fill(covers(np.maximum(gas, left + 6)), -960)


def _great_vessels(s: _Slice) -> None:
    """Aorta, superior vena cava, pulmonary trunk and arteries, oesophagus, azygos vein."""
    x, y, z = s.x, s.y, s.z
    tubes = [((24, 43), (12.5, 12.5)), ((-7, 47), (4, 4))]
    if z > -4:
        tubes += [((-6, -30), (16, 16)), ((-29, -16), (8.5, 10))]
    if -8 < z < 24:
        tubes += [((22, -34), (14, 15))]
    for centre, radii in tubes:
        s.fill(covers(ball((x, y), centre, radii)), BLOOD)
    for z0, to in ((12, (34, 4)), (4, (-36, 2))):
        near = max(0.0, 1 - ((z - z0) / 11) ** 2)
        if near > 0:
            start = (18, -26) if to[0] > 0 else (10, -12)
            s.fill(covers(rod((x, y), start, to, 9.5 * near**0.5)), BLOOD)
    calcified = np.maximum(np.abs(ball((x, y), (24, 43), (12, 12))) - 0.8, 33 - x + 0.6 * (y - 43))
    s.fill(covers(calcified) * float(-20 < z < 6), 620)
    oesophagus = ball((x, y), (6, 34), (8, 6))
    s.fill(covers(oesophagus), 35)
    s.fill(covers(oesophagus + 4.6) * float(z > -12), -600)
    for node in ((-18, -2, 30), (-14, 18, 8), (12, 2, 24), (2, 12, 2)):
        s.fill(covers(ball((x, y, z), node, (4, 3, 4))), 38)


def _ribs(s: _Slice) -> None:
    """Ribs fall towards the front, so that a slice cuts several; in front they are cartilage."""
    x, z = s.x, s.z
    around = s.angle / np.pi
    height = z + RIB_DROP_MM * around**1.3 + np.where(x > 0, 3.0, 0.0)
    offset = height - RIB_STEP_MM * np.round(height / RIB_STEP_MM)
    thick = 4.2 - 0.8 * around
    rib = np.hypot(offset * 0.62, s.cavity - 6.5) - thick
    ends = np.maximum(0.14 - around, around - 0.76) * 380
    s.bone(np.maximum(rib, ends), 1.5, 780, 170 + 40 * s.fine)
    cartilage = np.maximum(rib + 0.3, np.maximum(0.76 - around, around - 0.93) * 380)
    s.fill(covers(cartilage), 105)
    s.fill(0.5 * covers(np.abs(cartilage + 1) - 0.5), 230)


def _spine(s: _Slice) -> None:
    """Vertebra or disc, canal with cord, arch and processes, heads of the ribs."""
    x, y, z = s.x, s.y, s.z
    level = (z + 8) % RIB_STEP_MM - RIB_STEP_MM / 2
    disc = float(np.clip(3.2 - abs(abs(level) - RIB_STEP_MM / 2), 0, 1))
    erector = np.minimum(ball((x, y), (-27, 93), (24, 15)), ball((x, y), (27, 93), (24, 15)))
    s.fill(covers(erector, 2), MUSCLE + 8 * s.fine - 30 * (np.abs(s.coarse) < 0.15))
    waist = 1.5 * np.cos(2 * np.pi * level / RIB_STEP_MM)
    body = np.maximum(ball((x, y), (0, 60), (19 - waist, 17 - waist)), y - 72)
    marrow = 175 + 24 * s.fine - 60 * np.exp(-((x / 3) ** 2 + ((y - 66) / 5) ** 2))
    s.bone(body, 1.3, 620, marrow)
    s.fill(disc * covers(body), 85)
    arch = np.abs(ball((x, y), (0, 81), (12.5, 11.5))) - 2.6
    arch = np.maximum(arch, 69 - y) if abs(level) > 6 else arch
    spike = rod((x, y), (0, 92), (0, 108), 2.6 + 0.8 * abs(np.sin(level / 5)))
    bones = np.minimum(arch, spike)
    for side in (-1, 1):
        process = rod((x, y), (side * 13, 82), (side * 33, 87), 3.3)
        head = rod((x, y), (side * 23, 70), (side * 44, 83), 3.4)
        if abs(level) < 7:
            bones = np.minimum(bones, process)
        if abs(level) > 5:
            bones = np.minimum(bones, head)
    s.bone(bones, 1.3, 720, 190 + 40 * s.fine)
    canal = ball((x, y), (0, 80.5), (9.5, 8.5))
    s.fill(covers(canal), -20)
    s.fill(covers(canal + 1.5), 18)
    s.fill(covers(ball((x, y), (0, 80), (5.2, 4.4))), 42)


def _sternum(s: _Slice) -> None:
    """The breastbone."""
    width, depth = 17 - 0.03 * s.z - np.abs(s.x - 1), 5 - np.abs(s.y + 96.5 - 0.004 * s.x * s.x)
    s.bone(-join(width, depth, 5) - 1.5, 1.1, 420, 95 + 22 * s.fine)


def _scapulae(s: _Slice) -> None:
    """The shoulder blades, which end in the middle of the chest."""
    reach = float(np.clip((s.z + 30) / 60, 0, 1))
    thick = 1.3 + 1.1 * reach * (s.angle - 0.6)
    sheet = np.abs(s.cavity - 18.5 - 1.5 * np.sin(9 * s.angle)) - thick
    blade = np.maximum(sheet, (np.abs(s.angle - 0.82) - 0.34 * reach) * 105)
    if reach > 0:
        s.bone(blade, 1.1, 760, 230 + 40 * s.fine)


# --- the trees of the lung ----------------------------------------------------------------------
def _lung_trees(rng: np.random.Generator) -> _Trees:
    """Arteries and veins, trachea and bronchi."""
    vessels = []
    bronchi = [np.array([[0, 10, 38, 0, 2, 120, 8.6]])]
    for side in (-1, 1):
        targets = _points_in_lung(rng, side, 3600)
        vessels.append(tree(targets[:1800], (side * 34, 6, 8), 0.40))
        vessels.append(tree(targets[1800:], (side * 30, 4, -8), 0.40))
        airways = tree(targets[:90], (side * 38, 9, 10), 0.55)
        airways[:, 6] = np.minimum(airways[:, 6], 4.6)
        bronchi += [airways, np.array([[0, 10, 38, side * 38, 9, 10, 6.6]])]
    return _Trees(np.concatenate(vessels), np.concatenate(bronchi))


def _points_in_lung(rng: np.random.Generator, side: int, count: int) -> NDArray[np.float64]:
    """(count, 3) points in mm in one lung, beyond the slices too."""
    low, high = np.array([4, -90, -75]), np.array([130, 90, 75])
    points = rng.uniform(low, high, (count * 8, 3)) * (side, 1, 1)
    x, y, z = points.T
    inside = _lung(*_warped(x, y, z), z) < -3
    return points[inside][:count]
