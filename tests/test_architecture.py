"""Rules of the house that a reader can rely on."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import transquant
from transquant import errors
from transquant.container.dtypes import DTYPES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "transquant"
ROOMS = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
# what any room may use: records, errors and the helpers that know nothing of the domain
COMMON = {"records", "errors", "workers", "memory", "fingerprint", "grid", "trellis_code", "channels", "copying"}
# composed of rooms, above them: these may import any room, and no other room may import them
COMPOSERS = {"cli", "demo", "features", "integrations", "searching", "training"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """Names inside transquant that a file imports, by their first part."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" if node.module == "transquant" else node.module for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "transquant" and len(parts) > 1:
                yield parts[1]


def test_rooms_do_not_import_each_other():
    for path in modules():
        room = path.relative_to(PACKAGE).parts[0]
        if room not in ROOMS or room in COMPOSERS:
            continue
        strangers = {name for name in imports(path) if name != room and name not in COMMON}
        assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


def test_numpy_alone_where_it_is_promised():
    """The reader's path imports no torch and no numba; allocation and the container neither."""
    for name in ("reader.py", "grid.py", "trellis_code.py", "bitstream.py", "records.py", "channels.py", "errors.py", "entropy/portable.py", "entropy/tables.py",
                 "packing.py", "transforms/__init__.py", "transforms/layout.py", "transforms/exact.py", "transforms/fit.py"):  # fmt: skip
        assert not outside(PACKAGE / name) - {"numpy"}, name
    for room in ("allocation", "container"):
        for path in (PACKAGE / room).glob("*.py"):
            assert not outside(path) - {"numpy"}, path


def outside(path):
    """Packages outside the standard library that a file imports."""
    import sys

    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return {f for f in found if f not in sys.stdlib_module_names and f != "transquant"}


def test_nothing_executes_what_a_file_says():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "marshal", "shelve", "dill"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "torch.load":  # in one place, and never what can run code
                    assert path.relative_to(PACKAGE).as_posix() == "modules/files.py"
                    assert ("weights_only", "True") in [(k.arg, ast.unparse(k.value)) for k in node.keywords]
                    continue
                assert called not in ("eval", "exec", "compile", "os.system", "pickle.loads"), path
                assert not any(k.arg == "shell" for k in node.keywords), path


def test_files_stay_short():
    lengths = sorted(len(p.read_text().splitlines()) for p in modules())
    assert lengths[-1] <= 400
    assert lengths[len(lengths) // 2] <= 150


def exceptions():
    return {n: v for n, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, Exception)}


def test_the_list_of_errors_is_closed():
    tree = re.findall(r"^[│├└─ ]*(\w+)", errors.__doc__.split("\n\n", 1)[1], re.M)
    assert set(tree) == set(exceptions())
    page = (ROOT / "docs" / "errors.md").read_text()
    for name, error in exceptions().items():
        assert issubclass(error, errors.TransquantError)
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {error.exit_code} |" in row, name


def test_only_those_errors_are_raised():
    allowed = set(exceptions()) | {
        "AssertionError",
        "KeyError",
        "SystemExit",
        "typer.Exit",
        "AttributeError",
    }  # the last for a missing attribute
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                assert name in allowed or name.startswith("_"), (path, name)


def test_format_page_and_code_name_the_same_dtypes():
    page = (ROOT / "FORMAT.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `t` |"))
    assert set(re.findall(r"[a-z]+\d+|bool", row)) == set(DTYPES)


def test_public_names():
    names = {"compress", "load", "CompressedModel", "Limits", "Report", "errors", "reader", "features", "__version__"}
    assert names <= set(dir(transquant))
    assert {"calibrate", "load", "FeatureCodec"} <= set(dir(transquant.features))
    parameters = inspect.signature(transquant.compress).parameters
    for name in (
        "model",
        "calibration",
        "bits",
        "size",
        "ratio",
        "distortion",
        "step",
        "max_drop",
        "metric",
        "transform",
        "objective",
    ):
        assert name in parameters
    defaults = {k: p.default for k, p in parameters.items()}
    assert (defaults["metric"], defaults["transform"], defaults["objective"], defaults["effort"], defaults["seed"]) == (
        "auto",
        "auto",
        "bytes",
        5,
        0,
    )


def test_public_functions_say_what_they_raise():
    maps = transquant.features
    own = (maps.calibrate, maps.load, maps.FeatureCodec.attach, maps.FeatureCodec.split, maps.FeatureCodec.load)
    for function in (transquant.compress, transquant.load, transquant.CompressedModel.save, transquant.reader.load, *own):
        assert "Raise" in function.__doc__, function


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")], ids=lambda p: p.name)
def test_links_of_the_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
