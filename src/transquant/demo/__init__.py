"""A small network for handwritten digits that ships with its trained weights, and the demo that compresses it."""
