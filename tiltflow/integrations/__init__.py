"""Other libraries' models as base processes. Their conventions of time, sign and scale end here."""
