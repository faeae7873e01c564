"""Evaluation of chat models: readers and scorers of benchmarks, and played dialogues."""
