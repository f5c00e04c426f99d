"""What a CPU allocator holds beyond the arrays in use, as measured."""

from __future__ import annotations

from remora.runtime.memory import KEPT_KERNELS

KERNEL_BYTES = KEPT_KERNELS * 500_000
"""What they take, as measured; docs/log.md has the figures."""

MAPPED_BYTES = 1 << 25
"""Arrays from this size on are mapped by glibc each on its own, and given back when freed."""

FRAGMENT_BYTES = 140_000_000
FRAGMENTS = 0.3
LASTING_FRAGMENTS = 0.5
"""Smaller arrays lie in its heap, which keeps what it once needed. Micro-batches are of ever new
lengths, so what is freed fits what comes less and less: so many bytes are held in pieces of no use,
and this share of the most that a step has there, and of what came during training to stay there,
since that lies in between. Measured with glibc 2.36; docs/log.md has the figures."""

MAPPED_FRAGMENT_BYTES = 60_000_000
"""What is held in pieces where arrays from a megabyte on are mapped, as measured."""


def fragment_bytes(*, heap: int, mapped: int, peak: int, lasting: int) -> int:
    """Return what a processor's allocator holds beyond the peak of the arrays in use.

    Args:
        heap: Most bytes in arrays of the heap, at any moment.
        mapped: Most bytes in larger arrays, at any moment.
        peak: Most bytes of both together, at any moment.
        lasting: Bytes in the heap that come during training, to stay.
    """
    return (
        max(0, heap + mapped - peak)
        + FRAGMENT_BYTES
        + int(FRAGMENTS * heap + LASTING_FRAGMENTS * lasting)
    )
