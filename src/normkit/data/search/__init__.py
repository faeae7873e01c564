"""Words of the invented land that the search world asks about (our own, CC0)."""
