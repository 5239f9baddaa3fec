"""Number formats of weights: quantising, packing, the plan of a graph."""
