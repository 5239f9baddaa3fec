"""Times of devices that are not here."""
