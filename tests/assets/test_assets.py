"""The files for browsers: each is served as it lies there, and the modules of the page build a house of their own."""

import graphlib
import gzip
import posixpath
import re

from keepalive import assets
from tests.kit import PROJECT

FOLDER = PROJECT / "keepalive" / "assets"
FOUND = assets.read()
# `import … from "./x.js"` and `import("./x.js")`.
IMPORT = re.compile(r"""^import\b[^;]*?["'](.+?)["'];|\bimport\(["'](.+?)["']\)""", re.MULTILINE | re.DOTALL)
ARROWS = {
    name: {
        posixpath.normpath(posixpath.join(posixpath.dirname(name), early or late))
        for early, late in IMPORT.findall(asset.body.decode())
    }
    for name, asset in FOUND.items()
    if name.endswith(".js")
}
INDEX = FOUND["index.html"].body.decode()


def test_each_file_is_read_by_its_path_and_changes_its_tag_with_its_content():
    files = {
        path.relative_to(FOLDER).as_posix(): path.read_bytes()
        for path in FOLDER.rglob("*.*")
        if path.suffix in assets.CONTENT_TYPES
    }

    assert {name: asset.body for name, asset in FOUND.items()} == files
    assert {name: gzip.decompress(asset.gzipped) for name, asset in FOUND.items()} == files
    assert len({asset.etag for asset in FOUND.values()}) == len(set(files.values()))


def test_modules_import_what_is_there_and_no_way_leads_round():
    assert {to for tos in ARROWS.values() for to in tos} <= set(FOUND)
    graphlib.TopologicalSorter(ARROWS).prepare()  # raises with the way


def test_the_public_module_needs_nothing_beside_it():
    assert ARROWS["keepalive.js"] == set()


def test_no_module_lies_there_that_nobody_asks_for():
    entries = {name.removeprefix("/") for name in re.findall(r'<script[^>]* src="(.*?)"', INDEX)}
    used = entries.union(*ARROWS.values())

    assert used == set(ARROWS)


def test_the_page_asks_for_all_its_modules_at_once():
    """Else it would find them one after another, a round trip each; only the playground comes later."""
    asked = {name.removeprefix("/") for name in re.findall(r'rel="modulepreload" href="(.*?)"', INDEX)}
    needed, found = {"page/start.js"}, set()
    while needed:
        name = needed.pop()
        found.add(name)
        needed |= ARROWS[name] - found

    assert asked == found - {"page/start.js", "keepalive.js"}
