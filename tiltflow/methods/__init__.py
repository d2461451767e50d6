"""Methods, one file per idea; :mod:`tiltflow.methods.registry` is the table of them all."""
