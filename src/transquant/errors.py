"""Every exception that transquant raises on purpose. The list is closed; a test compares it with the documentation.

TransquantError              exit code
├── InputError               2   bad arguments, models, calibration data, paths
│   └── NotFollowed              a network whose graph cannot be traced
├── TargetError              3   a target that cannot be reached; says what can
├── FileError                4   what bad files raise
│   ├── CorruptFile
│   ├── UnsupportedVersion
│   └── LimitExceeded
├── MissingDependency        5   with the pip line that installs it
└── OutputError              6   the output cannot be written
"""

from __future__ import annotations


class TransquantError(Exception):
    """Base class. `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(TransquantError, ValueError):
    """An argument, model, calibration set or path that cannot be used: says what was given and what is allowed."""

    exit_code = 2


class NotFollowed(InputError):
    """A network whose channels cannot be followed from layer to layer: says where that ended."""


class TargetError(TransquantError, ValueError):
    """A target that no file can meet: says the smallest or largest that can be reached."""

    exit_code = 3


class FileError(TransquantError):
    """Base of what a bad compressed file raises."""

    exit_code = 4


class CorruptFile(FileError):
    """The file is damaged, truncated, or not a transquant file."""


class UnsupportedVersion(FileError):
    """The file needs a newer version of transquant."""


class LimitExceeded(FileError):
    """The file asks for more memory than the limits allow; see `Limits`."""


class MissingDependency(TransquantError, ImportError):
    """An optional dependency is missing: gives the pip line."""

    exit_code = 5


class OutputError(TransquantError, OSError):
    """The output cannot be written: folder missing, read-only, disk full."""

    exit_code = 6
