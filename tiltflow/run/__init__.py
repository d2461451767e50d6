"""Run folders, and the one flow of a job."""
