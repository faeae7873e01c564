"""Worlds that talk back."""
