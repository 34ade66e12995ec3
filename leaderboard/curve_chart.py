"""A curve as one self-contained SVG: the layers of the sandwich over eps, with the intervals at every radius judged.

Between two radii the true boundary is some falling step function; a straight line stands for it.
"""

from __future__ import annotations

import itertools
from typing import Final
from xml.sax.saxutils import escape

from robustboard.leaderboard.charts import LAYERS, percent
from robustboard.leaderboard.curve import Curve
from robustboard.leaderboard.metrics import Metric

_WIDTH, _HEIGHT = 820.0, 500.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 24.0, 104.0, 64.0
_NORMS: Final = {"linf": "L∞", "l2": "L2"}
_FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'Liberation Sans', sans-serif"
# Two labels of the eps axis closer than this would run into each other.
_LABEL_GAP: Final = 46.0
_STYLE: Final = (
    "svg{--paper:#fff;--ink:#1b1c1e;--muted:#62635f;--rule:#e4e1da;--certified:#0a5c92;--undecided:#8cc0e2;"
    "--hatch:#64a6d3;--broken:#d2571f;--misclassified:#cbc8c1}"
    "@media (prefers-color-scheme:dark){svg{--paper:#1a1d22;--ink:#e9e7e3;--muted:#a2a5aa;--rule:#2d3138;"
    "--certified:#4ea6e4;--undecided:#265a80;--hatch:#357aa9;--broken:#e8783f;--misclassified:#4b4f57}}"
    f"text{{font-family:{_FONT};fill:var(--muted);font-size:12.5px}}"
    ".title{fill:var(--ink);font-size:19px;font-weight:650}.key{fill:var(--ink)}"
    ".certified{fill:var(--certified)}.undecided{fill:url(#hatch)}.broken{fill:var(--broken)}"
    ".misclassified{fill:var(--misclassified)}.edge{fill:none;stroke:var(--paper);stroke-width:2}"
    ".grid{stroke:var(--paper);stroke-opacity:.35}.tick{stroke:var(--muted)}"
    ".own{stroke:var(--ink);stroke-dasharray:4 4}.bar{stroke:var(--ink);stroke-width:1.4}"
    ".halo{stroke:var(--paper);stroke-width:4;stroke-opacity:.55}.dot{fill:var(--paper);stroke:var(--ink);stroke-width:1.6}.mid{text-anchor:middle}.end{text-anchor:end}"
)


def curve_svg(curve: Curve) -> str:
    """Draw a curve; it opens in any browser and follows its light or dark setting."""
    points, clean = curve.points, curve.clean
    widest = points[-1].radius
    xs = [_LEFT, *(_x(point.radius, widest) for point in points)]
    # With no perturbation allowed, what is classified correctly is certified.
    certified = [clean.value, *(point.certified.value for point in points)]
    robust = [clean.value, *(point.robust.value for point in points)]
    bounds = ([0.0] * len(xs), certified, robust, [clean.value] * len(xs), [1.0] * len(xs))
    norm = _NORMS.get(curve.track["norm"], curve.track["norm"])
    title = f"{curve.defense['title']} on {curve.track['id']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        'aria-labelledby="title description">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="description">{escape(_described(curve))}</desc>',
        f"<style>{_STYLE}</style>",
        '<defs><pattern id="hatch" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="7" height="7" style="fill:var(--undecided)"/><rect width="2.2" height="7" '
        'style="fill:var(--hatch)"/></pattern></defs>',
        f'<rect width="{_WIDTH:g}" height="{_HEIGHT:g}" rx="10" style="fill:var(--paper)"/>',
        f'<text class="title" x="{_LEFT:g}" y="38">{escape(title)}</text>',
        f'<text x="{_LEFT:g}" y="60">{len(curve.reaches):,} examples; bars are Wilson 95 % intervals; '
        f"{percent(curve.saved['judged'])} % of the verdicts follow from other radii</text>",
        *_legend(),
    ]
    parts += [
        f'<path class="{verdict}" d="{_area(xs, below, above)}"><title>{label}</title></path>'
        for (verdict, label, _), (below, above) in zip(LAYERS, itertools.pairwise(bounds), strict=True)
    ]
    parts += [
        f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{_y(share)}" y2="{_y(share)}"/>'
        for share in (0.25, 0.5, 0.75)
    ]
    for edge in (certified, robust):
        steps = " ".join(f"{x:.1f},{_y(share)}" for x, share in zip(xs, edge, strict=True))
        parts.append(f'<polyline class="edge" points="{steps}"/>')
    parts += _axes(curve, xs, norm)
    for x, point in zip(xs[1:], points, strict=True):
        parts += _mark(x, "certified", point.eps, point.certified)
        parts += _mark(x, "robust", point.eps, point.robust)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _described(curve: Curve) -> str:
    rows = "; ".join(
        f"eps {point.eps}: certified {percent(point.certified.value)} %, robust {percent(point.robust.value)} %"
        for point in curve.points
    )
    return f"Clean {percent(curve.clean.value)} %; {rows}."


def _legend() -> list[str]:
    parts, x = [], _LEFT
    for verdict, label, _ in LAYERS:
        parts.append(f'<rect class="{verdict}" x="{x:g}" y="76" width="22" height="12" rx="2"/>')
        parts.append(f'<text class="key" x="{x + 29:g}" y="86.5">{label}</text>')
        x += 62 + 7.2 * len(label)
    return parts


def _axes(curve: Curve, xs: list[float], norm: str) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = [
        f'<text class="end" x="{_LEFT - 9:g}" y="{float(_y(share)) + 4:.1f}">{100 * share:g} %</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    taken = -_LABEL_GAP
    own = curve.track["eps"]
    labels = [("0", xs[0]), *((text, x) for (text, _), x in zip(curve.grid, xs[1:], strict=True))]
    for text, x in labels:
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:g}" y2="{bottom + 5:g}"/>')
        if x - taken >= _LABEL_GAP:
            parts.append(f'<text class="mid" x="{x:.1f}" y="{bottom + 20:g}">{escape(text)}</text>')
            taken = x
        if text == own:
            parts.append(
                f'<line class="own" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4:g}" y2="{bottom:g}">'
                f"<title>the track's own eps, {escape(own)}</title></line>"
            )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="mid" x="{middle:g}" y="{_HEIGHT - 18:g}">radius ε of the {escape(norm)} ball; dashed: the '
        f"track's own, {escape(own)}</text>"
    )
    return parts


def _mark(x: float, name: str, eps: str, metric: Metric) -> list[str]:
    words = (
        f"{name} at ε = {escape(eps)}: {percent(metric.value)} % [{percent(metric.low)}, {percent(metric.high)}], "
        f"n = {metric.n}"
    )
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{_y(metric.low)}" y2="{_y(metric.high)}"'
    return [
        f'<g><title>{words}</title><line class="halo" {ends}/><line class="bar" {ends}/>'
        f'<circle class="dot" cx="{x:.1f}" cy="{_y(metric.value)}" r="3.6"/></g>'
    ]


def _area(xs: list[float], below: list[float], above: list[float]) -> str:
    up = [f"{x:.1f},{_y(share)}" for x, share in zip(xs, above, strict=True)]
    down = [f"{x:.1f},{_y(share)}" for x, share in zip(reversed(xs), reversed(below), strict=True)]
    return f"M{' L'.join(up + down)} Z"


def _x(radius: float, widest: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * radius / widest


def _y(share: float) -> str:
    return f"{_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share):.1f}"
