"""Commands of the command line that are a file of their own; each has ``main(arguments)``."""
