"""Scenarios of the emotional-support world."""
