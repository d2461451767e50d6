"""The second job: sample from an energy."""
