"""What the package may not contain, and what compiled code may not do, whatever a file says."""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz_target import sections

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "transquant"
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.tq"))
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "cloudpickle",
    "ctypes",
    "socket",
    "urllib",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "setattr", "delattr", "__import__", "torch.load", "os.system", "os.popen", "input"}
# the files that read other files; what they look up by name comes from a list of allowed names, checked before
READERS = ["reader.py", "bitstream.py", "grid.py", "records.py", "metadata.py", "container", "entropy"]


def trees():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def calls(tree):
    return [(ast.unparse(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def test_nothing_that_runs_what_a_file_says():
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name.split(".")[0] for a in node.names} | {(getattr(node, "module", None) or "").split(".")[0]}
                allowed = (
                    {"ctypes"} if path == Path("memory.py") else set()
                )  # one call of the C library, without arguments of anybody's
                assert not names & FORBIDDEN_MODULES - allowed, path
        for name, node in calls(tree):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if path == Path("modules/files.py") and keywords.get("weights_only") == "True":
                assert name == "torch.load"  # state dicts from a user's own file, as data: never for compressed files
                continue
            assert name not in FORBIDDEN_CALLS, (path, name)
            assert keywords.get("allow_pickle", "False") == "False", path
            assert "shell" not in keywords, path
            if name.endswith(("np.load", "numpy.load")):
                assert keywords["allow_pickle"] == "False", path
            assert not name.startswith(("subprocess.", "yaml.")), (path, name)


def test_the_one_call_of_the_c_library_takes_a_constant():
    (memory,) = [tree for path, tree in trees() if path == Path("memory.py")]
    assert {name for name, _ in calls(memory)} == {"suppress", "ctypes.CDLL", "ctypes.CDLL(None).malloc_trim"}
    assert not any(node.args.args for node in ast.walk(memory) if isinstance(node, ast.FunctionDef))


def test_the_list_of_what_is_forbidden_is_read_as_meant():
    tree = ast.parse("import pickle\nsetattr(a, b, c)\ntorch.load(x)\nnp.load(p, allow_pickle=True)")
    assert {name for name, _ in calls(tree)} == {"setattr", "torch.load", "np.load"}


def test_readers_look_nothing_up_by_a_name_from_a_file():
    for path, tree in trees():
        if path.parts[0] in READERS:
            for name, _ in calls(tree):
                assert name not in ("getattr", "globals", "vars", "import_module", "importlib.import_module", "open") or (
                    name == "open" and path.name == "paths.py"
                ), (path, name)
    composers = [tree for path, tree in trees() if path in (Path("codec.py"), Path("running.py"))]
    looked_up = [ast.unparse(node) for tree in composers for name, node in calls(tree) if name == "getattr"]
    assert looked_up == ["getattr(torch, dtype)"]  # of DTYPES: see below


def test_every_dtype_of_a_file_is_a_dtype_of_torch():
    import torch

    from transquant.container.dtypes import DTYPES

    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)


STRICT = """
import sys, warnings
import transquant.reader
for path in sys.argv[1:]:
    assert transquant.reader.load(path)
"""


def test_golden_files_decode_in_development_mode_without_a_warning():
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", STRICT, *map(str, GOLDEN)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


BOUNDS = """
import sys
sys.path.insert(0, {tests!r})
import numba, numpy as np
from pathlib import Path

@numba.njit
def outside(a, k):
    return a[k]

try:
    outside(np.zeros(3), 3)
    sys.exit("bounds are not checked: the test would prove nothing")
except IndexError:
    pass

import fuzz_target
from mutators import mutant
from tqfile import split
from mutate_bytes import SECTION_MUTATORS

rng = np.random.default_rng(0)
fuzz_target.QUICK = 0  # the compiled decoder alone
sources = fuzz_target.SOURCES
for source in sources:
    fuzz_target.consume(b"\\0" + source.join())
for number in range(400):
    source = sources[number % len(sources)]
    try:
        bad = SECTION_MUTATORS[number % len(SECTION_MUTATORS)](rng, source, sources)
    except (IndexError, ValueError):
        continue
    fuzz_target.consume(b"\\0" + bad.join())
for number in range(600):
    fuzz_target.consume(b"\\0" + mutant(sources, 1, number)[1], repair=False)
print("inside")
"""


def test_compiled_code_stays_inside_its_arrays(tmp_path):
    """With bounds checks compiled in, on good and damaged sections, encoder included (the sources are encoded there)."""
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}  # not what was compiled without
    code = BOUNDS.format(tests=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "inside\n"), done.stderr


SAME = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import torch
import transquant as tq
from fuzz_target import sections
from conftest import make_net
torch.set_num_threads({threads})
images = torch.randn(40, 3, 12, 12, generator=torch.Generator().manual_seed(1))
print(hashlib.sha256(tq.compress(make_net(), images, step=0.05, effort=1).data).hexdigest())
"""


def test_the_same_file_whatever_the_hash_seed_and_threads():
    digests = set()
    for seed, threads in (("0", 1), ("4242", 2)):
        code = SAME.format(tests=str(ROOT / "tests"), threads=threads)
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        digests.add(done.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.name)
def test_integers_of_golden_files(path):
    """The decoded integers, apart from what becomes of them: the compiled decoder, the numpy one and what was written agree."""
    from transquant import bitstream
    from transquant.container import read_container
    from transquant.entropy import lanes, portable

    container = read_container(path.read_bytes())
    digests = []
    for decode in (lambda *job: lanes.decode_planes(*job)[0], portable.decode_planes):
        planes: list[bytes] = []

        def keep(*job, decode=decode, planes=planes):
            found = decode(*job)
            planes.extend(p.astype("<i4").tobytes() for p in found)
            return found

        bitstream.decode(container, sections(keep))
        digests.append(hashlib.sha256(b"".join(planes)).hexdigest())
    assert digests[0] == digests[1]
    if path.name in INTEGERS:
        assert digests[0] == INTEGERS[path.name]


INTEGERS = {
    "version1.tq": "ec85116e5475abd25d4a70737eda0a905237e4a9b9934462f1aab58bf51f7580"
}  # SHA-256 of all planes, little-endian int32
