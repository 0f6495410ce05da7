"""Values to integers and back: the uniform quantizer, its step grid, and two-sided error feedback."""
