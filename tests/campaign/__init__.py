"""Long runs that try to break the product, seeded and bounded; a slice of each is in the suite."""
