"""Data sets: real ones, read from packages the user has installed."""
