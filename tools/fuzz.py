"""Coverage-guided fuzzing of both readers, with the golden files as seeds.

    pip install -c constraints.txt -e ".[fuzz]"
    python tools/fuzz.py --seconds 600 [--corpus FOLDER] [--as-is] [-- libFuzzer options]

An input's first byte says what the rest is: a whole file, the text of a header, or the bytes of one section of a seed; what
is around it is made right, checksums too, or else the fuzzer would never see what is behind them (`--as-is`: only whole
files, as they are). A finding is anything but a documented exception, or two readers that disagree: the fuzzer stops,
prints the traceback and leaves the input in `crash-...`. Inputs worth keeping go to tests/hostile_seeds/.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit('fuzzing needs atheris: pip install -c constraints.txt -e ".[fuzz]"')

# the fuzzer itself grows by some 8 KB an input (the readers do not: tools/hostile.py), so its memory says nothing
OPTIONS = ["-max_len=4096", "-len_control=0", "-timeout=60", "-rss_limit_mb=12000", "-print_final_stats=1"]
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

# the compiled coder is left out: numba compiles the plain functions, not instrumented ones
with atheris.instrument_imports(include=["transquant", "json"], exclude=["transquant.entropy.lanes"]):
    from fuzz_target import SOURCES, consume, seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=-1, help="stop after so many inputs")
    parser.add_argument("--corpus", type=Path, help="folder to keep and continue the corpus in")
    parser.add_argument("--as-is", action="store_true", help="whole files, checksums not repaired")
    given, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        corpus = given.corpus or Path(temporary)
        corpus.mkdir(parents=True, exist_ok=True)
        for name, data in seeds():
            (corpus / name).write_bytes(data[1:] if given.as_is else data)
        options = [f"-max_total_time={given.seconds}", f"-runs={given.runs}", *OPTIONS]
        print(f"{len(SOURCES)} sources, {len(list(corpus.iterdir()))} seeds", file=sys.stderr)
        target = (lambda data: consume(b"\0" + data, repair=False)) if given.as_is else consume
        atheris.Setup([sys.argv[0], *options, *(r for r in rest if r != "--"), str(corpus)], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
