"""Keeps torch.fx from remembering the source text of every model that was ever traced.

It hands the code of each graph to `linecache`, for tracebacks, and never takes it back: some ten kilobytes a session of
a server that runs for months.
"""

from __future__ import annotations

import linecache

from torch.fx import graph_module

__all__ = ["KEPT", "forget_old_sources"]

KEPT = 100
"""Sources of the newest graphs that stay."""

_PREFIX = "<eval_with_key>."  # then the graph's number


def forget_old_sources() -> None:
    """Drop all but the newest sources; a traceback through an older graph then has no lines of its code."""
    texts = getattr(getattr(graph_module, "_loader", None), "eval_cache", {})
    for names in (texts, linecache.cache):
        known = [name for name in list(names) if name.startswith(_PREFIX)]  # others may trace meanwhile
        for name in known[:-KEPT]:
            names.pop(name, None)
