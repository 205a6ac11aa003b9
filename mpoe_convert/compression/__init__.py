"""Which ranks, in which metric: calibration, budgets, corrections."""
