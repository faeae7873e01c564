"""Labelled replies for fitting and checking judges."""
