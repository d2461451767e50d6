"""The first job: tilt a base towards a reward."""
