"""Exception groups, as task groups raise them, brought back to the one error that somebody can act on."""

from collections.abc import Iterator


def first_error(group: BaseExceptionGroup[BaseException], *preferred: type[BaseException]) -> BaseException:
    """Return the first error in a group, one of `preferred` before any other."""
    errors = list(_leaves(group))
    return next((error for error in errors if isinstance(error, preferred)), errors[0])


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
