"""The static site: one page that opens from a disk, and the data behind it for download.

Rendering is a pure function from records to bytes: the same records give the same files, in whatever order they come.
The page needs no network and no JavaScript; what little style and script it has is inline, and its
Content-Security-Policy allows exactly those two by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from robustboard.errors import OutputError, RecordError
from robustboard.leaderboard import charts
from robustboard.leaderboard.downloads import board_csv, board_json
from robustboard.leaderboard.ranking import SIGNIFICANCE, Board, boards
from robustboard.leaderboard.record import Record
from robustboard.leaderboard.views import BoardView, board_view

_GENERATOR: Final = '<meta name="generator" content="RobustBoard">'
# Characters that reorder the text around them (Trojan Source), control characters but tab and newline, and lone
# surrogates, which cannot be encoded.
_DISRUPTIVE: Final = re.compile(
    "[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
)


def build_site(records: Iterable[Record], out: Path, *, title: str = "RobustBoard") -> Path:
    """Write the site of `records` into `out` and return the path of its index.html.

    The site is written beside `out` and moved there when it is complete, so a failure leaves the old one.

    Raises:
        RecordError: if there are no records, or one has no outcome table attached.
        OutputError: if `out` cannot be written, or holds something that is not such a site.
    """
    files = render_site(records, title=title)
    try:
        check_target(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            # One level down: mkdtemp makes its folder private to this user, and a site is for everybody.
            fresh = staging / "site"
            for name, content in files.items():
                path = fresh / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            _swap(fresh, out, staging / "old")
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"The site cannot be written to {out}: {error.strerror or error}.") from error
    return out / "index.html"


def render_site(records: Iterable[Record], *, title: str = "RobustBoard") -> dict[str, bytes]:
    """All files of the site by their path relative to it.

    Raises:
        RecordError: if there are no records, or one has no outcome table attached.
    """
    ranked = boards(records)
    if not ranked:
        raise RecordError("There are no records to make a site of; score a defense first.")
    slugs = _slugs(ranked)
    views = [board_view(board, slug) for board, slug in zip(ranked, slugs, strict=True)]
    files = {"index.html": _page(views, title)}
    for board, view in zip(ranked, views, strict=True):
        files[view.csv] = board_csv(board).encode()
        files[view.json] = board_json(board).encode()
        for row in view.rows + view.apart:
            files[row.outcomes] = row.record.outcomes_parquet
    return files


def _page(views: Sequence[BoardView], title: str) -> bytes:
    style, script = _static("site.css"), _static("site.js")
    environment = Environment(
        loader=DictLoader({name: _template(name) for name in ("index.html", "board.html", "details.html")}),
        autoescape=True,
        finalize=_inert,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    defenses = {row.record.defense.name for view in views for row in view.rows + view.apart}
    page = environment.get_template("index.html").render(
        title=title,
        generator=Markup(_GENERATOR),
        style=Markup(style),
        script=Markup(script),
        style_hash=_source_hash(style),
        script_hash=_source_hash(script),
        views=views,
        layers=charts.LAYERS,
        significance=f"{100 * SIGNIFICANCE:g}",
        defenses=len(defenses),
    )
    return page.encode()


def _inert(value: Any) -> Any:
    """Show characters that would disturb the text around them as replacement characters."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _DISRUPTIVE.sub("\ufffd", value)


def _source_hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _template(name: str) -> str:
    return resources.files("robustboard.leaderboard.templates").joinpath(name).read_text(encoding="utf-8")


def _static(name: str) -> str:
    return resources.files("robustboard.leaderboard.static").joinpath(name).read_text(encoding="utf-8")


def _slugs(ranked: Sequence[Board]) -> list[str]:
    """A short name for each board that is safe in a file name and an address; a hash where two would be the same."""
    plain = [re.sub(r"[^a-z0-9.]+", "-", board.track_id.lower()).strip("-.")[:80] or "track" for board in ranked]
    return [
        f"{slug}-{board.track_hash[:8]}" if plain.count(slug) > 1 else slug
        for slug, board in zip(plain, ranked, strict=True)
    ]


def check_target(out: Path) -> None:
    """Refuse a place that `build_site` would refuse, for a caller with long work before it.

    Raises:
        OutputError: if `out` is there and holds something that is not such a site.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"The site cannot be written to {out}: it is not a folder.")
    index = out / "index.html"
    if index.is_file():
        with index.open("rb") as file:
            if _GENERATOR.encode() in file.read(4096):
                return
    if any(out.iterdir()):
        raise OutputError(
            f"The folder {out} holds something that is not a RobustBoard site; name a new or empty folder."
        )


def _swap(fresh: Path, out: Path, old: Path) -> None:
    """Put `fresh` where `out` is; if that fails, what was there comes back."""
    if not out.exists():
        fresh.rename(out)
        return
    out.rename(old)
    try:
        fresh.rename(out)
    except OSError:
        old.rename(out)
        raise
