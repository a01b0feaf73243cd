from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def never_rests() -> Iterator[None]:
    """Reads at once whatever comes, also where a busy machine makes a faked stream look like a slow link."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wire.rest.Rest.after", lambda *_: 0.0)
        yield
