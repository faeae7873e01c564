"""One recipe per published system."""
