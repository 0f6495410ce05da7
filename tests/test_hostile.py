"""Hostile files: the documented exceptions, in bounded time and memory, and nothing else. Bombs have a file of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fuzz_target
import hostile_check
import transquant as tq
from hostile_check import Violation, check
from mutate_bytes import SECTION_MUTATORS, TEXT_MUTATORS
from mutators import HEADER_MUTATORS, mutant
from tqfile import made, repaired_frame, split
from transquant import reader
from transquant.errors import CorruptFile, FileError, UnsupportedVersion

HERE = Path(__file__).parent
GOLDEN = sorted((HERE / "golden").glob("*.tq"))
golden_files = pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name)


def test_a_thousand_hostile_files(tmp_path):
    """Ten thousand: `python tools/hostile.py --count 10000`; the numpy reader gets every fifth here, being slow."""
    output = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(HERE.parent / "tools" / "hostile.py"),
        "--count",
        "1000",
        "--numpy-every",
        "5",
        "-o",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(output.read_text())["figures"]
    assert figures["violations"] == []
    assert sum(figures["outcomes"].values()) == 1000
    assert set(figures["outcomes"]) == {"decoded", "CorruptFile", "UnsupportedVersion", "LimitExceeded"}
    assert 20 < figures["outcomes"]["decoded"] < 300  # the parser and the decoder are reached, and most damage is found
    assert figures["longest, compiled reader and report, s"] < 10
    assert figures["memory above the start, MB"] < 200


def test_the_check_finds_what_it_looks_for(tmp_path, monkeypatch):
    good = GOLDEN[0].read_bytes()
    assert check(good, tmp_path / "a.tq").error == "decoded"

    def broken(value):
        def load(*arguments, **options):
            if isinstance(value, Exception):
                raise value
            return value

        return load

    arrays = reader.loads(good)
    other = {**arrays, "exact": arrays["exact"] + 1}
    for value in (KeyError("a"), MemoryError(), CorruptFile("a\nb"), CorruptFile("x" * 500), CorruptFile("no"), other, {}):
        with monkeypatch.context() as patch:
            patch.setattr(hostile_check.reader, "load", broken(value))
            with pytest.raises(Violation):
                check(good, tmp_path / "a.tq")


@golden_files
def test_every_mutator_changes_every_golden_file(path):
    """So that new kinds of files are mutated as old ones are; what is repaired gets past the checksums."""
    good = path.read_bytes()
    parts = split(good)
    assert tq.reader.loads(parts.join()).keys() == tq.reader.loads(repaired_frame(good)).keys()
    for change in {*HEADER_MUTATORS, *SECTION_MUTATORS, *TEXT_MUTATORS}:
        made_of_it = set()
        for seed in range(12):
            try:
                bad = change(np.random.default_rng(seed), parts, [parts])
            except (IndexError, KeyError, TypeError, ValueError, AttributeError):
                continue
            made_of_it.add(bad.join())
        assert made_of_it - {parts.join()}, change.__name__


@golden_files
def test_damage_anywhere_is_found_by_a_checksum(path):
    """Every byte after the magic and version is covered."""
    good = path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 0x10
        with pytest.raises(FileError):
            reader.loads(bytes(bad))


def test_mutants_repeat():
    parts = [split(p.read_bytes()) for p in GOLDEN]
    assert [mutant(parts, 3, k) for k in range(40)] == [mutant(parts, 3, k) for k in range(40)]


@pytest.mark.parametrize("name", [name for name, _ in fuzz_target.seeds()])
def test_seeds_of_the_fuzzer(name):
    """The golden files, and what fuzzing has found."""
    fuzz_target.consume(dict(fuzz_target.seeds())[name])


def test_a_short_fuzz(tmp_path):
    pytest.importorskip("atheris", reason='fuzzing needs atheris: pip install -c constraints.txt -e ".[fuzz]"')
    tool = str(HERE.parent / "tools" / "fuzz.py")
    done = subprocess.run([sys.executable, tool, "--seconds", "15", "--runs", "4000"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "number_of_executed_units" in done.stderr


def test_the_fuzzer_says_what_is_missing():
    code = (
        "import sys; sys.modules['atheris'] = None; sys.argv = ['fuzz.py']; import runpy; runpy.run_path(%r, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code % str(HERE.parent / "tools" / "fuzz.py")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == 'fuzzing needs atheris: pip install -c constraints.txt -e ".[fuzz]"'


# ------------------------------------------------------------------------------------------- found before


def base() -> dict:
    return split(fuzz_target.tiny()).value


def with_header(change) -> bytes:
    parts = split(fuzz_target.tiny())
    value = parts.value
    change(value)
    return parts.with_value(value).join()


def test_an_alias_of_an_alias_is_another_name(tmp_path):
    arrays = reader.loads(fuzz_target.tiny())
    assert arrays["c"].tobytes() == arrays["a"].tobytes() == arrays["w"].tobytes()
    check(fuzz_target.tiny(), tmp_path / "a.tq")


@pytest.mark.parametrize("eps", [10**400, -(10**400), float("1e308"), 1, True, None, -1e-9])
def test_eps_of_any_size(eps):
    with pytest.raises(CorruptFile, match="eps"):
        reader.loads(with_header(lambda h: h["tensors"][2].update(e=eps)))


@pytest.mark.parametrize("target", ["absent", "n" * 512])
def test_long_names_do_not_make_long_messages(target):
    with pytest.raises(CorruptFile) as caught:
        reader.loads(with_header(lambda h: h["tensors"].append({"k": "a", "n": "m" * 512, "o": target})))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", ["a\x00", "a\x1b[2J", "\x7f", "\x85", "\x9b2J"])
def test_names_cannot_steer_a_terminal(name):
    with pytest.raises(CorruptFile, match="control characters"):
        reader.loads(with_header(lambda h: h["tensors"][0].update(n=name)))
    with pytest.raises(CorruptFile, match="control characters"):
        reader.loads(with_header(lambda h: h.update(metadata={"distortion": name})))


@pytest.mark.parametrize("text", ["kl nan", "kl inf", "kl -inf", "kl 1e999"])
def test_a_report_has_no_number_that_json_has_not(text, tmp_path):
    (tmp_path / "a.tq").write_bytes(with_header(lambda h: h.update(metadata={"distortion": text})))
    report = tq.load(tmp_path / "a.tq").report
    assert report.predicted_distortion is None
    json.dumps(report.as_dict(), allow_nan=False)


def test_newer_files_say_so():
    newer = bytearray(fuzz_target.tiny())
    newer[4] = 99
    changes = [
        lambda h: h.update(features=["trellis"]),
        lambda h: h.update(new=1),
        lambda h: h["sections"][0].__setitem__(0, "new"),
    ]
    changes += [lambda h, k=key: h["tensors"][0].update({k: "new"}) for key in "zxk"]
    for bad in [bytes(newer), *map(with_header, changes)]:
        with pytest.raises(UnsupportedVersion, match="newer version"):
            reader.loads(bad)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b'{"step": NaN}', b"[" * 2000, b'{"step":[2048,0],"step":[2048,0]}', b'{"step":' + b"9" * 5000 + b"}", b"\xff\xfe{}"],
)  # fmt: skip
def test_headers_that_are_no_headers(text):
    with pytest.raises(FileError):
        reader.loads(made(text))


KILLED = """
import sys, os, signal, threading, torch
sys.path.insert(0, {tests!r})
from conftest import make_net
import transquant.cli as cli
import transquant.container.file as file
real = os.replace
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = die   # the last moment before the file would appear
import transquant as tq
tq.compress(make_net(), None, size=3000).save({path!r})
"""


def test_killed_before_the_rename_leaves_no_output(tmp_path):
    from pathlib import Path

    path = tmp_path / "net.tq"
    code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    assert not path.exists()
