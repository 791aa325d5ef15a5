"""Recipes: trainings of several steps as data, one TOML file each. `martlet train --recipe NAME` runs them."""
