"""A command in several processes, started by torchrun: they share the work, and process 0 alone prints and writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

SHARED = ("compress", "train")  # commands that share their work; the others are run by process 0 alone
LONGEST = timedelta(days=7)  # that one process may wait for another


def leads() -> bool:
    """Whether this process prints and writes."""
    return not _launched() or os.environ.get("RANK", "0") == "0"


def be_silent() -> None:
    """Nothing that is printed here is seen."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def leave(code: object) -> None:
    """End a process that torchrun started, at once. After a backward pass and an exchange over gloo, one in three aborts while
    the interpreter takes down torch's threads (2.13.0: "terminate called without an active exception"), with its work all done."""
    if _launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


@contextmanager
def joined(command: str) -> Iterator[bool]:
    """Whether this process has anything to do. Inside, what goes wrong in one process goes wrong in all."""
    if not _launched():
        yield True
        return
    if command not in SHARED:
        yield leads()
        return
    import torch.distributed as dist

    from transquant.processes import processes

    dist.init_process_group("gloo", timeout=LONGEST)
    try:
        with processes() as job, job.together():
            yield True
    finally:
        dist.destroy_process_group()


def _launched() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
