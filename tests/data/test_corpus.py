"""The embedded corpus: what text it is, made once, whole again whatever happened to it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import golf_jax
from golf_jax.data import corpus
from golf_jax.data.manifest import damage
from golf_jax.data.verify import verify_directory

TEXTS = [f"Document {number} has its own words: {number * 7919:x} and {number * 104729:o}." for number in range(200)]
SOURCE = '''#!/usr/bin/env python3
# Copyright.

r"""Of the module, with \\d
  and a second line."""

X = """a value"""
y = f(
    """an argument""",
)


class C(
    Base,
):
    """Of a class."""

    async def f(self, x: str = "a:b"):
        # a comment between
        """
        Of a coroutine.

            indented
        """
        return """no docstring
"""

    def g(self): pass
    """Of nothing."""

    def h(self):
        """ """
'''


def test_the_docstrings_of_a_source_are_found_without_its_other_strings():
    found = ["Of the module, with \\d\nand a second line.", "Of a class.", "Of a coroutine.\n\n    indented"]
    assert list(corpus._docstrings(SOURCE)) == found
    assert list(corpus._docstrings("") or corpus._docstrings("x = 1\n")) == []
    assert list(corpus._docstrings(SOURCE + '# three quotes in a comment: """\n')) == []  # where strings begin cannot be told


BUILD_IN_A_PROCESS = """
import json, sys
from golf_jax.data.corpus import build_embedded
print(json.dumps(build_embedded(sys.argv[1], 512)))
"""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    root = tmp_path_factory.mktemp("embedded")
    environment = {**os.environ, "PYTHONPATH": str(Path(golf_jax.__file__).parents[1])}
    command = [sys.executable, "-c", BUILD_IN_A_PROCESS, str(root)]
    racers = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return root, [json.loads(racer.communicate()[0]) for racer in racers]


def test_embedded_corpus_is_about_two_megabytes_of_sound_data(embedded):
    manifest = embedded[1][0]
    size = manifest["train"]["bytes"] + manifest["val"]["bytes"]
    assert 1_200_000 < size < 4_000_000 and manifest["val"]["bytes"] > 0.04 * size
    assert verify_directory(manifest["directory"]).problems == []


def test_embedded_corpus_is_built_once_by_racing_builders(embedded, monkeypatch):
    root, (one, two) = embedded
    assert one == two and [path.name for path in root.iterdir()] == [one["directory"].rsplit("/", 1)[1]]

    def fail(*args, **options):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(corpus, "build_documents", fail)
    assert corpus.build_embedded(root, 512) == one


def test_the_slower_builder_takes_the_faster_ones_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "documents", lambda: TEXTS)
    rename = os.rename

    def lose(temporary, directory):
        shutil.copytree(temporary, directory)
        (directory / "winner").touch()
        rename(temporary, directory)

    monkeypatch.setattr(os, "rename", lose)
    manifest = corpus.build_embedded(tmp_path, 300)
    directory = Path(manifest["directory"])
    assert (directory / "winner").exists() and [path.name for path in tmp_path.iterdir()] == [directory.name]


def test_embedded_corpus_hash_follows_what_it_is_made_of(monkeypatch):
    before = corpus.content_hash(512)
    assert corpus.content_hash(512) == before != corpus.content_hash(1024)
    monkeypatch.setattr(corpus, "_topics", lambda: {"one": "text"})
    corpus.content_hash.cache_clear()
    assert corpus.content_hash(512) != before
    corpus.content_hash.cache_clear()


@pytest.mark.parametrize("name", ["val_000000.bin", "tokenizer.model", "extra.bin"])
def test_a_damaged_embedded_corpus_is_made_anew(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpus, "documents", lambda: TEXTS)
    manifest = corpus.build_embedded(tmp_path, 300)
    path = Path(manifest["directory"]) / name
    path.write_bytes(path.read_bytes()[:-1] + b"\7" if path.exists() else b"")
    assert corpus.build_embedded(tmp_path, 300) == manifest
    assert damage(Path(manifest["directory"])) == ""


@pytest.mark.parametrize("what", ["pipe", "file", "link to nothing", "link to a damaged one", "damaged one that stays"])
def test_whatever_lies_in_place_of_the_embedded_corpus_is_replaced(tmp_path, monkeypatch, what):
    monkeypatch.setattr(corpus, "documents", lambda: TEXTS)
    manifest = corpus.build_embedded(tmp_path / "cache", 300)
    place, elsewhere = Path(manifest["directory"]), tmp_path / "elsewhere"
    (place / "val_000000.bin").write_bytes(b"")
    if what != "damaged one that stays":
        place.rename(elsewhere)
    if what == "pipe":
        os.mkfifo(place)
    elif what == "file":
        place.write_text("")
    elif what.startswith("link"):
        place.symlink_to(elsewhere if what == "link to a damaged one" else "nothing")
    else:
        monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    assert corpus.build_embedded(tmp_path / "cache", 300) == manifest
    assert damage(place) == ""
    assert what == "damaged one that stays" or [path.name for path in place.parent.iterdir()] == [place.name]
