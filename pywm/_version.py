"""The version, stated once: read by the build, passed to the compiled module and compared at import."""

__version__ = "0.1.0"
