"""Values to integers and back: the uniform quantizer, saturating codes, and two-sided error feedback."""
