"""What a bit costs while a network learns: so much that its file comes out at the size that was asked for.

The first price is the theory's: the slope of the rate–distortion function at the template's scalar c, in units of the loss a bit.
From there it follows the size of the file, which is encoded anew every few steps (a proportional and an integral part).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

PROPORTIONAL, INTEGRAL = 12.0, 3.0  # e-folds of the price for a file e times too large, at once and a measurement
LOWEST = 2.5  # e-folds that the price may be below the theory's where steps can change
FINER = 0.5  # e-folds of all steps a measurement, for each e-fold that the file is too small
RANGE = 9.0  # e-folds that the price may move up, and down


@dataclass(slots=True)
class Price:
    """`first`: units of the loss a bit; the others are memory."""

    first: float
    memory: float = 0.0
    error: float = 0.0

    @property
    def now(self) -> float:
        """Units of the loss a bit."""
        return self.first * exp(min(max(self.memory + PROPORTIONAL * self.error, -RANGE), RANGE))

    def measure(self, size: float, target: float) -> None:
        """The file has `size` bytes where `target` are wanted now."""
        self.error = min(max(log(size / target), -0.25), 0.25)
        self.memory = min(max(self.memory + INTEGRAL * self.error, -RANGE), RANGE)

    def turn(self) -> float:
        """By how many e-folds all steps of the file should change now. What has become zero does not come back when bits get
        cheaper; but with finer steps the price chooses again what is worth its bits. It goes with their square."""
        self.memory = max(self.memory, -LOWEST)
        change = FINER * min(self.error, 0.0)
        self.first *= exp(2 * change)
        return change
