"""Samplers as data: `schedulers` names them, `compile` turns one into a `table`, which the runtime reads."""
