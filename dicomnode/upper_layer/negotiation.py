"""Which presentation contexts are accepted (PS3.8 9.3.3.2, PS3.4 B.2)."""

from collections.abc import Callable, Mapping

from pydicom.uid import UID
from pynetdicom import ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts

from dicomnode.upper_layer.pdu import (
    AnsweredContext,
    ContextResult,
    ProposedContext,
    UserInformation,
)

VERIFICATION = "1.2.840.10008.1.1"
_DICOM_ROOT = "1.2.840.10008."
_STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."
_STORAGE = frozenset(str(context.abstract_syntax) for context in AllStoragePresentationContexts)
_RETIRED_JPEG = [f"1.2.840.10008.1.2.4.{n}" for n in (*range(52, 57), *range(58, 67))]
TRANSFER_SYNTAXES = (*map(str, ALL_TRANSFER_SYNTAXES), *_RETIRED_JPEG)
"""What is accepted and stored as received; retired JPEG (PS3.6 A) too, which few can decode."""
_LITTLE_ENDIAN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
"""Of messages without pixel data."""


def is_storage(abstract_syntax: str) -> bool:
    """Do we keep instances of this SOP class?

    Yes for every storage class of the library, for retired and for newer standard ones, and for
    private ones: who may send at all may archive anything here.
    """
    if abstract_syntax in _STORAGE or not abstract_syntax.startswith(_DICOM_ROOT):
        return True
    name = UID(abstract_syntax).name
    new_or_retired = name == abstract_syntax or "Storage" in name
    return abstract_syntax.startswith(_STORAGE_ROOT) and new_or_retired


def is_ours(abstract_syntax: str) -> bool:
    """Storage or Verification?"""
    return abstract_syntax == VERIFICATION or is_storage(abstract_syntax)


def answered(
    context: ProposedContext,
    user: UserInformation,
    allows: Callable[[str], bool],
    services: Mapping[str, bool],
) -> AnsweredContext:
    """Accept with the first proposed transfer syntax that we know, so that data come as they are.

    `allows`: whether this requestor may store a class. One that does not want to be SCU of the
    class (PS3.7 D.3.3.4) has no use for us. `services`: what is served beside storage, and whether
    the requestor may be its SCP, too.
    """
    abstract = context.abstract_syntax
    scu, scp = (user.roles or {}).get(abstract, (True, False))
    served = abstract in services
    syntaxes = _LITTLE_ENDIAN if served else TRANSFER_SYNTAXES
    known = [uid for uid in context.transfer_syntaxes if uid in syntaxes]
    welcome = served or abstract == VERIFICATION or allows(abstract)
    if not (served or is_ours(abstract)):
        result = ContextResult.ABSTRACT_SYNTAX_NOT_SUPPORTED
    elif not known:
        result = ContextResult.TRANSFER_SYNTAXES_NOT_SUPPORTED
    elif not (welcome and (scu or (scp and services.get(abstract, False)))):
        result = ContextResult.USER_REJECTION
    else:
        return AnsweredContext(context.context_id, ContextResult.ACCEPTANCE, known[0])
    return AnsweredContext(context.context_id, result)
