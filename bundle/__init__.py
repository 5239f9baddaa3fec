"""The ground floor: the bundle's format and what every other room speaks."""
