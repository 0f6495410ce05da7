"""One Lagrange multiplier for the whole model: steps from sensitivities, and the search on the one scalar. numpy only."""
