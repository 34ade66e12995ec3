"""A picture of a track's corruptions, for a person to look at: is it what the names promise, and can one still see?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from robustboard.bench.arrays import Images
from robustboard.bench.corrupted import Pictures
from robustboard.bench.corruptions import SETS
from robustboard.bench.protocol import Examples, Track
from robustboard.errors import DataError

_TILE = 96  # small images are enlarged by a whole factor to about this many pixels
_GAP = 6
_MARGIN = 18
_LABEL = 170
_TITLE = 18
_TEXT = 14
_PAPER = (255, 255, 255)
_INK = (28, 32, 36)
_FADED = (96, 104, 112)
_COLUMNS = 6


@dataclass(frozen=True)
class _Row:
    """One line of the sheet: what it is called, and its images (N, C, H, W)."""

    label: str
    images: Images


def contact_sheet(track: Track, examples: Examples, pictures: Pictures, *, first: int = 0) -> Image.Image:
    """Draw the sheet.

    Where the track has severities, a row is a corruption of one example and a column a severity; where each corruption
    has one severity only, a column is an example.

    Args:
        track: the track.
        examples: what it judges.
        pictures: gives the corrupted images.
        first: the (first) example shown, counted from 0 in the track's order.

    Raises:
        DataError: if there is no such example, its images are neither grey nor RGB, or the track has no corruptions.
    """
    if not 0 <= first < len(examples):
        raise DataError(f"{track.id} has the examples 0 to {len(examples) - 1}, not {first}.")
    if examples.images.shape[1] not in (1, 3):
        raise DataError(f"Images of {examples.images.shape[1]} channels cannot be shown.")
    suite = track.corruptions
    if not suite.conditions:
        raise DataError(f"{track.id} has no corruptions to show.")
    fixed = suite.severities == "fixed"
    rows = np.arange(first, min(first + _COLUMNS, len(examples))) if fixed else np.array([first])
    names = [examples.class_names[examples.labels[row]] for row in rows]
    clean = examples.images[rows]
    if fixed:
        lines = [_Row("clean", clean)]
        for name, severity in suite.conditions:
            label = f"{name} {severity}" if SETS[suite.set].allows(name, 2) else name
            lines.append(_Row(label, pictures(name, severity, rows)))
        heads = [f"{row}: {name}" for row, name in zip(rows, names, strict=True)]
    else:
        lines = []
        for name in suite.names:
            severities = [severity for other, severity in suite.conditions if other == name]
            shown = [pictures(name, severity, rows) for severity in severities]
            lines.append(_Row(name, np.concatenate([clean, *shown])))
        heads = ["clean", *(f"severity {severity}" for severity in suite.severities)]
    title = f"{track.id}: {SETS[suite.set].title}"
    one = f"example {first} ({names[0]}, {examples.hashes[first][:12]})"
    which = f"examples {first} to {rows[-1]}" if fixed else one
    return _drawn(title, f"{which}, seed {suite.seed}", heads, lines)


def _drawn(title: str, subtitle: str, heads: Sequence[str], rows: Sequence[_Row]) -> Image.Image:
    height, width = rows[0].images.shape[2:]
    factor = max(round(_TILE / max(height, width)), 1)
    tile = (width * factor, height * factor)
    top = _MARGIN + 2 * _TITLE + 3 * _GAP + _TEXT + _GAP
    size = (
        max(2 * _MARGIN + _LABEL + len(heads) * (tile[0] + _GAP), 760),
        top + len(rows) * (tile[1] + _GAP) + _MARGIN,
    )
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(_TITLE), ImageFont.load_default(_TEXT)
    pen.text((_MARGIN, _MARGIN), title, fill=_INK, font=large)
    pen.text((_MARGIN, _MARGIN + _TITLE + _GAP), subtitle, fill=_FADED, font=small)
    left = _MARGIN + _LABEL
    for column, head in enumerate(heads):
        centre = left + column * (tile[0] + _GAP) + tile[0] // 2
        pen.text((centre, top - _GAP), head, fill=_FADED, font=small, anchor="ms")
    for line, row in enumerate(rows):
        y = top + line * (tile[1] + _GAP)
        pen.text((_MARGIN, y + tile[1] // 2), row.label, fill=_INK, font=small, anchor="lm")
        for column, image in enumerate(row.images):
            sheet.paste(_picture(image).resize(tile, Image.Resampling.NEAREST), (left + column * (tile[0] + _GAP), y))
    return sheet


def _picture(image: Images) -> Image.Image:
    pixels = image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
