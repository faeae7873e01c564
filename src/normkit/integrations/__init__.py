"""Thin adapters to the engines that people already use."""
