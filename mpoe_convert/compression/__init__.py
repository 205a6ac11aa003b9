"""Decide which ranks the matrices keep: calibrate, choose ranks under a budget, correct what is left."""
