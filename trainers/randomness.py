"""Seeds keyed by what they are for, never by rank or history."""

import hashlib


def stream_seed(seed: int, *key: str | int) -> int:
    """Return the 63-bit seed of one named stream."""
    text = "/".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
