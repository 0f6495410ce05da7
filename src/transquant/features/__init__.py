"""Feature maps: what a network passes from layer to layer, coded."""
