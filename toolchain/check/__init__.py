"""`diffbuild check`: the compiled model against the model, component by component and in whole pictures."""
