"""Entropy coding of planes of integers: adaptive integer models, interleaved rANS lanes (FORMAT.md sections 4 and 5).

`lanes` holds the compiled coder, encode and decode from one model function; `portable` decodes with numpy alone and
gives the same integers. Both read the constants of `tables`.
"""

from transquant.entropy.tables import lanes_for

__all__ = ["lanes_for"]
