"""The same model through what a user would pick instead, measured beside this runtime."""
