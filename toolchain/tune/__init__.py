"""Which layers of a model may be quantised at which cost: measured, searched to a budget, written as a recipe."""
