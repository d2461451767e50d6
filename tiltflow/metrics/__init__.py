"""Distances and mode weights between sample sets. ESS, log Z and path weights are in :mod:`tiltflow.core.weights`."""
