"""One seed in the recipe, an independent stream for each use of randomness."""

import hashlib


def derive(seed: int, *purpose: object) -> int:
    """A seed in ``[0, 2**63)`` for one purpose, as in ``derive(spec.seed, "sample", step)``."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
