"""Errors of all weights count alike: plain SVD."""

from . import FitMetric

FIT = FitMetric(about="plain SVD of the weights")
