"""Database of the tool world: an invented land, its towns, goods, events and songs."""
