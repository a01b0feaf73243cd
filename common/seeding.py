"""Random numbers that depend on where they are used, never on what ran before (invariant 2)."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Derive a seed from a path such as ``(seed, step, chunk, "middle")``.

    Args:
        parts: integers and short strings; order matters.

    Returns:
        A non-negative integer below 2**63, the same on every machine.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
