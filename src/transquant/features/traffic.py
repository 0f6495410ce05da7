"""A model of memory traffic: every map is written once and read once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that pass between chip and memory: as they are coded, and at 8 and 16 bits a value without coding."""

    coded: int
    eight_bit: int
    sixteen_bit: int

    @property
    def against_eight_bit(self) -> float:
        """How many times less than with eight bits a value."""
        return self.eight_bit / self.coded if self.coded else float("nan")

    @property
    def against_sixteen_bit(self) -> float:
        """How many times less than with sixteen bits a value."""
        return self.sixteen_bit / self.coded if self.coded else float("nan")


def traffic(values: int, coded_bytes: int) -> Traffic:
    """Of maps with so many values in so many bytes, each written once and read once."""
    return Traffic(2 * coded_bytes, 2 * values, 4 * values)
