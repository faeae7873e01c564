"""Contract checkers that users run on their own classes."""
