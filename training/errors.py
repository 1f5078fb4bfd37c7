"""What a training command stops for; the message says what to do."""

from dicomnode.errors import DicomNodeError


class TrainingError(DicomNodeError):
    """The data, the split or a checkpoint is not what a run needs."""
