"""Numerics: sites, tensor trains, low-rank factors. Knows no checkpoint and no recipe."""

# How singular vectors are computed: see `mpo.fit`.
SVDS = ("auto", "exact", "randomized")
