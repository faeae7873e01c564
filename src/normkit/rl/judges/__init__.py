"""Judges: what gives a turn its reward."""
