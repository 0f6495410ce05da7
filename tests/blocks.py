"""Runs the blocks of a page, in order, in one folder, as a reader would run them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest

# torchvision beside a torch that it was not built for misses operators that nothing here uses: declared, never defined
SITE = """
import importlib.util, torch
if importlib.util.find_spec("torchvision") and not hasattr(torch.ops.torchvision, "nms"):
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def blocks_of(path):
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(), re.M | re.S)


def commands(block):
    """The lines of a shell block without their comments."""
    return [line for raw in block.splitlines() if (line := re.sub(r"\s+#.*", "", raw).strip())]


def run_block(language, block, folder, **environment):
    """Run one block; the number of commands in it."""
    assert language in ("python", "bash")
    scripts = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], "COLUMNS": "200", **environment}
    lines = [[sys.executable, "-c", block]] if language == "python" else [["bash", "-c", line] for line in commands(block)]
    for line in lines:
        done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line[-1]}\n{done.stderr}"
    return len(lines)


def offline(folder):
    """Environment of blocks with other libraries: nothing is downloaded, torchvision can be imported."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    return {"PYTHONPATH": str(folder / "site"), "HF_HUB_OFFLINE": "1"}


def need(*libraries):
    """Skip a test, or a whole file of tests, where one of them is missing."""
    missing = [library for library in libraries if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f'needs {" and ".join(missing)}: pip install "transquant[zoo]"', allow_module_level=True)
