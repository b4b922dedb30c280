"""The pictures that pages and tables show are there, small, and no others."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"docs/images": 60_000, "benchmarks/results": 200_000}  # bytes at most
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*/*.md")]
ELSEWHERE = re.compile(r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/main/")
SHOWN = {
    (page.parent / ELSEWHERE.sub("", name)).resolve().relative_to(ROOT)
    for page in PAGES
    for name in re.findall(r"!\[[^\]]+\]\(([^)]+\.png)\)", page.read_text())
}


@pytest.mark.parametrize("picture", sorted(SHOWN), ids=lambda path: path.stem)
def test_a_picture_is_there_and_small(picture: Path) -> None:
    assert (ROOT / picture).stat().st_size <= FOLDERS[str(picture.parent)]


def test_every_picture_is_shown() -> None:
    stored = {path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.png")}
    assert {path.relative_to(ROOT) for path in stored} == SHOWN
