"""Data sets and generators that need no network."""
