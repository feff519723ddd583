"""recipe + model -> plan -> artifacts -> bundle. Planning imports neither torch nor diffusers."""
