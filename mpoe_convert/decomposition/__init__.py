"""Numerics: sites, tensor trains, low-rank factors. Knows no checkpoint and no recipe."""
