"""SeriesNumbers of what is made of a series: none equals another in the same study.

Images have the source's number by the route's rule, D. What goes with them, and the second and
further stacks of the source, have a block of 10,000 numbers that D alone decides, so that a
neighbouring series, or one that comes later, cannot have taken them:

    D                        images, or those of the first stack
    10000 D + 1 ... 9        their companions
    10000 D + 10, 20, ...    images of the second, third ... stack
    10000 D + 11 ... 19      companions of the second stack

A number follows from the source alone, so that a repeat on another host gives the same bytes.
Where IS has no room (D above 214747) companions count on from their images.
"""

GSPS, QA_REPORT, CLASSIFIER, RETRACTION = 1, 2, 3, 9
"""What a companion adds to the number of its stack's place in the block."""
_BLOCK = 10_000
_STACK = 10
_LARGEST = 2**31 - 1
"""Of an IS (PS3.5 6.2)."""
_LARGEST_WITH_BLOCK = _LARGEST // _BLOCK - 1


def images_number(source: object, rule: str | int, stack: int = 0) -> int:
    """SeriesNumber of derived images.

    Args:
        source: SeriesNumber of the source; an unusable one counts as 0.
        rule: "+N" is added to it, a number replaces it.
        stack: number from 1 of a stack of several, else 0.
    """
    text, beside = str(rule), _STACK * max(stack - 1, 0)
    number = int(text)
    if text.startswith("+") and isinstance(source, int) and 0 < source <= _LARGEST - number:
        number += source
    if not beside:
        return number
    if number <= _LARGEST_WITH_BLOCK and beside < _BLOCK:
        return _BLOCK * number + beside
    return number + beside if number + beside <= _LARGEST else beside


def companion_number(images: object, kind: int) -> int:
    """SeriesNumber of what goes with images.

    Args:
        images: their SeriesNumber, as from `images_number`.
        kind: `GSPS`, `QA_REPORT`, `CLASSIFIER` or `RETRACTION`.
    """
    number = int(str(images)) if images else 0
    if 0 < number <= _LARGEST_WITH_BLOCK:
        return _BLOCK * number + kind
    return number + kind if 0 <= number <= _LARGEST - kind else kind
