"""Data files: found where people keep them, else downloaded, and always checked against the digest that names them."""

import hashlib
import os
import shutil
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm


class DataMissing(FileNotFoundError):
    """A data file that is nowhere; the message says where it was looked for and how to get it."""


class ChecksumError(ValueError):
    """A file whose bytes are not the ones that its checksum names."""


def cache_folder() -> Path:
    """$ZOO_CACHE, or ~/.cache/gatedfwa-zoo."""
    return Path(os.environ.get("ZOO_CACHE") or Path.home() / ".cache" / "gatedfwa-zoo")


def fetch(name: str, urls: Sequence[str], sha256: str, root: Path | None = None) -> Path:
    """The file `name` (a relative path, `tinyshakespeare/input.txt`), checked against its sha256.

    Looked for under `root` (if given), $ZOO_DATA, then the cache folder; else downloaded into the cache folder (or
    `root`) from the first of `urls` that answers; `address.zip#path/inside` is a file of an archive. Raises
    DataMissing, or ChecksumError for a file that differs.
    """
    cache = cache_folder()
    shared = os.environ.get("ZOO_DATA")
    folders = [folder for folder in (root, Path(shared) if shared else None, cache) if folder is not None]
    for folder in folders:
        if (folder / name).is_file():
            check_sha256(folder / name, sha256)
            return folder / name

    home = root or cache
    failures = []
    for url in urls:
        try:
            return (_unpack if "#" in url else _download)(url, home / name, sha256)
        except (OSError, ValueError, HTTPException) as error:
            failures.append(f"  {url}: {error}")
    looked = "\n".join(f"  {folder / name}" for folder in folders)
    raise DataMissing(
        f"the data file {name!r} is not here. Looked in:\n{looked}\n"
        + (f"Downloads failed:\n{chr(10).join(failures)}\n" if failures else "It has no address to download from.\n")
        + (f"Canonical address: {urls[0]}\n" if urls else "")
        + f"sha256: {sha256}\nTo place it by hand: copy the file to {home / name}, or set ZOO_DATA to the folder that "
        f"holds {name}{' (now ' + shared + ')' if shared else ''}."
    )


def check_sha256(path: Path, sha256: str) -> None:
    found = file_sha256(path)
    if found != sha256.lower():
        raise ChecksumError(
            f"{path} has sha256 {found}, not {sha256.lower()}: it is damaged or another version. "
            "Remove it to have it downloaded again, or put the right file there."
        )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(url: str, path: Path, sha256: str) -> Path:
    """One file of a zip archive. The archive stays beside it for the others; it is its files that are checked."""
    address, _, member = url.partition("#")
    archive = path.with_name(address.rpartition("/")[2])
    if not archive.is_file():
        _download(address, archive, None)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(archive) as files:
            part.write_bytes(files.read(member))
        check_sha256(part, sha256)
        os.replace(part, path)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        archive.unlink()
        raise ValueError(f"{member}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _download(url: str, path: Path, sha256: str | None) -> Path:
    """Into `path`.part, checked, then made real by a rename: a broken download never looks like a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "gatedfwa-zoo"})
        with urllib.request.urlopen(request, timeout=60) as answer, part.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm.wrapattr(answer, "read", total=total, desc=path.name, leave=False) as blocks:
                shutil.copyfileobj(blocks, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        if sha256 is not None:
            check_sha256(part, sha256)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# A user's own files, in sub-folders by class

SPLITS = ("train", "valid", "test")


@dataclass
class ClassFolder:
    """The files of a folder that have one of `endings`: (path, split, class), sorted; `cats/1.png`, or
    `train/cats/1.png` where splits have folders. Files right in the folder (or in a split's) are of one class, `all`.
    Without split folders, files go to splits by a hash of their path, `share` of them to valid and to test each.

    Raises FileNotFoundError, or ValueError for a folder without files, and for a class folder without any. `what` is
    the word for a file in messages.
    """

    root: Path
    share: float
    endings: frozenset[str]
    what: str
    files: list[tuple[Path, str, str]] = field(init=False, default_factory=list)
    named: bool = field(init=False, default=False)  # splits have folders
    classes: tuple[str, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(f"task.dataset.path = {str(self.root)!r} is no folder")
        folders = {split: self.root / split for split in SPLITS if (self.root / split).is_dir()}
        self.named = bool(folders)
        for split, folder in (folders or {"": self.root}).items():
            for path, label in self._labelled(folder):
                self.files.append((path, split or hashed_split(path.relative_to(self.root), self.share), label))
        if not self.files:
            listed = ", ".join(sorted(self.endings)[:12]) + (", …" if len(self.endings) > 12 else "")
            raise ValueError(f"{self.root} holds no {self.what}; accepted endings: {listed}")
        self.classes = tuple(sorted({label for _, _, label in self.files}))

    def _labelled(self, folder: Path) -> list[tuple[Path, str]]:
        """(path, class) of every file below `folder`."""
        found = [(path, "all") for path in self._in(folder, deep=False)]
        for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
            inside = self._in(inner, deep=True)
            if not inside:
                raise ValueError(f"the class folder {inner} holds no {self.what}: remove it, or put {self.what}s in it")
            found += [(path, inner.name) for path in inside]
        return found

    def _in(self, folder: Path, *, deep: bool) -> list[Path]:
        paths = folder.rglob("*") if deep else folder.glob("*")
        return sorted(path for path in paths if path.is_file() and path.suffix.lower() in self.endings)


def hashed_split(name: Path, share: float) -> str:
    place = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:4], "big") / 2**32
    return "valid" if place < share else "test" if place < 2 * share else "train"
