"""Entropy coding of planes of integers: adaptive integer models, interleaved rANS lanes (FORMAT.md sections 4 and 5).

`lanes` holds the compiled coder: the models of `binary` decisions and of `tokens`, each one function for both directions, and
`rans`. `portable` decodes with numpy alone and gives the same integers. Both read the constants of `tables`; `streams` cuts large
sections into parts.
"""

from transquant.entropy.tables import lanes_for

__all__ = ["lanes_for"]
