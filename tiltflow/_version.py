"""The version, where nothing else of the package has to be imported for it."""

from importlib.metadata import version

__version__ = version("tiltflow")
