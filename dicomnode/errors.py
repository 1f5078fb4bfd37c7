"""Every error this package raises on purpose.

    DicomNodeError
    ├── ConfigError            config.yaml is wrong; the message names the key
    ├── NotYetError            a key or command of the contract that this version does not have
    ├── InstanceRefused        an SOP instance answered with a failure status
    │   ├── OutOfResources       0xA700
    │   ├── DataSetMismatch      0xA900
    │   ├── CannotUnderstand     0xC000
    │   └── DuplicateInstance    0x0111
    ├── ProtocolError          a peer breaks PS3.7 or PS3.8; the association is aborted
    ├── OperationRefused       a DIMSE-N request answered with a failure status
    ├── SeriesRefused          a stored series that must not be translated, and why
    ├── PackageError           a model package is damaged or does not fit
    ├── Cancelled              an operator or a later generation wants a job no more
    ├── OutOfMemory            not even one slice of a series fits in memory
    ├── DeviceLost             a GPU failed; only a new process can use it again
    ├── WorkerLost             a worker process died or did not answer
    ├── JournalError           a change of state that the life-cycle table does not have
    │   └── JournalBusy          the journal takes no change now: locked, or the disk is full
    ├── BackupError            a backup that cannot be made there, or that cannot be trusted
    └── DeliveryError          a derived series did not reach its destination
        ├── NoAssociation        nothing of it was even sent; it may be later
        └── DeliveryRefused      and never will, as things stand

Messages carry UIDs and attribute keywords, never attribute values of the patient. Every message
says what is wrong and what to do about it.
"""


class DicomNodeError(Exception):
    """Base class: catch this to catch anything we raise."""


class ConfigError(DicomNodeError):
    """The configuration is wrong; the message starts with the path of the key."""


class NotYetError(ConfigError):
    """Part of the contract that this version does not do; refused rather than ignored."""


class InstanceRefused(DicomNodeError):
    """An SOP instance we do not keep; `status` is the C-STORE response status (PS3.4 B.2.3)."""

    status = 0x0110


class OutOfResources(InstanceRefused):
    """Refused: out of resources (PS3.4 Table B.2-1)."""

    status = 0xA700


class DataSetMismatch(InstanceRefused):
    """Error: data set does not match SOP class (PS3.4 Table B.2-1)."""

    status = 0xA900


class CannotUnderstand(InstanceRefused):
    """Error: cannot understand (PS3.4 Table B.2-1)."""

    status = 0xC000


class DuplicateInstance(InstanceRefused):
    """Another instance of the same SOP Instance UID is stored (PS3.7 C.5.6)."""

    status = 0x0111


class ProtocolError(DicomNodeError):
    """What a peer sent is no message of PS3.7 or PS3.8; the upper layer aborts the association."""


class OperationRefused(DicomNodeError):
    """A DIMSE-N request that is answered with a failure `status` (PS3.7 Annex C)."""

    def __init__(self, status: int, comment: str, error_id: int | None = None) -> None:
        super().__init__(comment)
        self.status = status
        self.error_id = error_id


class SeriesRefused(DicomNodeError):
    """A stored series that must not be translated.

    Attributes:
        code: machine-readable reason, for example ``MISSING_SLICES``.
        remedy: what the administrator or the sender can do.
    """

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(f"{code}: {message}; {remedy}")
        self.code = code
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type["SeriesRefused"], tuple[str, str, str]]:
        return SeriesRefused, (self.code, self.message, self.remedy)


class PackageError(DicomNodeError):
    """A model package is damaged, or does not fit what it was asked to do."""


class Cancelled(DicomNodeError):
    """A job that runs is not wanted any more; raised between two batches."""


class OutOfMemory(DicomNodeError):
    """Not even one slice fits in the memory there is now; the job may run again later."""


class DeviceLost(DicomNodeError):
    """A GPU failed, and does no more work for this process; a new process may have it again."""


class WorkerLost(DicomNodeError):
    """A worker process died or stopped answering; the job it had can run again.

    Attributes:
        crashed: it ended by itself (a segmentation fault, for example), which speaks against what
            it was doing. Not so when it was killed from outside: an operator, lack of memory.
    """

    def __init__(self, message: str, *, crashed: bool = False) -> None:
        super().__init__(message)
        self.crashed = crashed


class JournalError(DicomNodeError):
    """The journal cannot do what was asked; the message names the record and its state."""


class JournalBusy(JournalError):
    """The journal takes no change now: another program has locked it, or the disk is full."""


class BackupError(DicomNodeError):
    """A backup cannot be made where it was asked for, or the disk does not keep it."""


class DeliveryError(DicomNodeError):
    """A derived series did not reach its destination; it stays in the outbox and is retried."""


class NoAssociation(DeliveryError):
    """No association came about, so that nothing was sent; trying again may help."""


class DeliveryRefused(DeliveryError):
    """The destination refuses for good (PS3.8 9.3.4 permanent, or 0xA9xx/0xCxxx)."""
