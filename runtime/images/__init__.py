"""Pictures on their way to the vision graph."""
