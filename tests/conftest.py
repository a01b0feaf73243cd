import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Models of a user's own, as `--import` finds them on a server.
sys.path.insert(0, str(Path(__file__).parent / "system" / "models"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Computes on one thread: small tensors gain nothing from a second, and wait for it on a busy machine."""
    import torch  # here, for many tests do without

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
