"""The order of what the server computes: on a GPU, work on another stream would not wait for it."""

from contextlib import contextmanager

from cloud.work import Work


class Streams:
    """Knows whether the compute stream is the current one."""

    is_computing = False

    @contextmanager
    def computing(self):
        self.is_computing = True
        yield
        self.is_computing = False


def test_what_lies_between_chunks_runs_where_they_do():
    streams = Streams()
    work = Work(None, streams, seed=0)
    assert work.between(lambda scale: (streams.is_computing, scale), 0.5) == (True, 0.5)
    assert not streams.is_computing
