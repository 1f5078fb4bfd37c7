"""A DICOM node that turns received series into new, clearly labelled derived series."""

__version__ = "0.1.0"
