"""The files that a source has: those of a folder, or of a tar, which is read where it is."""

import posixpath
from collections.abc import Iterable
from typing import Any, NamedTuple

from ul_scale.data import storage, tar

COMPRESSED = (".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
# Beside images in a tar, they say that it is a shard already.
_SHARD_PARTS = {"cls", "json"}


class Entry(NamedTuple):
    """A file of a source, or a member of an archive.

    Attributes:
        name: its path from the source; `A.tar` inside a source is taken for a folder `A`.
        path: the file on the source's filesystem that its bytes are in.
        start: byte at which they start there.
        size: their number.
    """

    name: str
    path: str
    start: int
    size: int


class Listing(NamedTuple):
    """A source's files in the order of their names, and all its folders likewise, empty ones too."""

    fs: Any
    entries: list[Entry]
    folders: list[str]


def list_source(url: str) -> Listing:
    """List a folder or a tar. Hidden files are left out.

    A folder that holds nothing but class archives (`n01440764.tar` …), as ImageNet's training set is
    shipped, is listed as if they were unpacked, and so is a tar of such archives.

    Raises:
        ValueError: if there is no such source, or if it is an archive that cannot be used.
    """
    fs, root = storage.open_folder(url)
    if root.lower().endswith(COMPRESSED):
        raise ValueError(f"{url}: is compressed; unpack it, and give the folder or the .tar")
    if fs.isfile(root):
        if not root.lower().endswith(".tar"):
            raise ValueError(f"{url}: is a file; expected a folder or a .tar")
        entries = _strip_common_folders(list(_expand(fs, Entry("", root, 0, fs.size(root)), url)))
        return Listing(fs, _ordered(entries, url), sorted(_folders(entries)))
    if not fs.isdir(root):
        raise ValueError(f"{url}: no such folder")
    found = fs.find(root, withdirs=True, detail=True)
    names = {path[len(root) :].strip("/"): info for path, info in found.items()}
    names = {name: info for name, info in names.items() if name and "/." not in f"/{name}"}
    linked = next((n for n, info in names.items() if info.get("islink") and fs.isdir(info["name"])), None)
    if linked is not None:
        raise ValueError(f"{url}: {linked} is a link to a folder, which is not followed; expected folders")
    folders = {name for name, info in names.items() if info["type"] == "directory"}
    files = [
        Entry(name, info["name"], 0, info["size"])
        for name, info in names.items()
        if info["type"] != "directory"
    ]
    if files and all(entry.name.lower().endswith(".tar") and "/" not in entry.name for entry in files):
        files = [inner for entry in files for inner in _expand_class_archive(fs, entry, url)]
    return Listing(fs, _ordered(files, url), sorted(folders | _folders(files)))


def read_entry(fs: Any, entry: Entry) -> bytes:
    """Return an entry's bytes."""
    return storage.read_range(fs, entry.path, entry.start, entry.start + entry.size)


def _expand(fs: Any, archive: Entry, url: str) -> Iterable[Entry]:
    """Yield the files of a tar, those of tars in it included."""
    for entry in _archive_members(fs, archive, url):
        if entry.name.lower().endswith(".tar"):
            yield from _expand_class_archive(fs, entry, url)
        else:
            yield entry


def _expand_class_archive(fs: Any, archive: Entry, url: str) -> Iterable[Entry]:
    """Yield the files of a tar as those of a folder of its name; it may not hold further tars."""
    where = f"{url}/{archive.name}"
    for entry in _archive_members(fs, archive, where):
        part = entry.name.rsplit(".", 1)[-1].lower()
        if part == "tar":
            raise ValueError(f"{where}: is an archive of archives; give it on its own as the source")
        if part in _SHARD_PARTS:
            raise ValueError(
                f"{where}: holds {entry.name}, so it is a shard, not a class; "
                "index existing shards with: ul-scale data index URL"
            )
        yield entry._replace(name=posixpath.join(archive.name[: -len(".tar")], entry.name))


def _archive_members(fs: Any, archive: Entry, where: str) -> Iterable[Entry]:
    """Yield the files of a tar, which may lie inside another."""
    for member in tar.read_members(fs, archive.path, archive.start, archive.size, where):
        name = member.name.removeprefix("./")
        try:
            tar.split_name(name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if "/." not in f"/{name}":
            yield Entry(name, archive.path, archive.start + member.content, member.length)


def _strip_common_folders(entries: list[Entry]) -> list[Entry]:
    """Drop a folder that everything in a tar is in, as long as folders are left below it."""
    while entries and all(entry.name.count("/") >= 2 for entry in entries):
        top = entries[0].name.split("/", 1)[0] + "/"
        if not all(entry.name.startswith(top) for entry in entries):
            break
        entries = [entry._replace(name=entry.name[len(top) :]) for entry in entries]
    return entries


def _folders(entries: list[Entry]) -> set[str]:
    folders, deeper = set[str](), {posixpath.dirname(entry.name) for entry in entries}
    while deeper:
        folders |= deeper
        deeper = {posixpath.dirname(name) for name in deeper} - folders
    return folders - {""}


def _ordered(entries: list[Entry], url: str) -> list[Entry]:
    entries.sort()
    for one, two in zip(entries, entries[1:]):
        if one.name == two.name:
            raise ValueError(f"{url}: {one.name} comes twice")
    return entries
