"""Is it right? Checks before training, verdicts after."""
