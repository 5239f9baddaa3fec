"""The top floor: the command line."""
