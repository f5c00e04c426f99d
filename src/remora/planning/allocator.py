"""Memory that the CPU allocator holds beyond the arrays in use, as measured."""

from __future__ import annotations

from remora.runtime.memory import KEPT_KERNELS

KERNEL_BYTES = KEPT_KERNELS * 500_000
"""Memory of the kept kernels, as measured; docs/log.md has the figures."""

MAPPED_BYTES = 1 << 25
"""Arrays from this size on are mapped by glibc one by one, and given back when freed."""

FRAGMENT_BYTES = 140_000_000
FRAGMENTS = 0.5
LASTING_FRAGMENTS = 0.5
"""Smaller arrays are in its heap, which fragments as micro-batches keep changing length. Fragments
are a constant, a share of the most that a step has in the heap, and a share of the arrays that are
allocated there during training and stay, since they lie in between. Measured with glibc 2.36;
docs/log.md has the figures."""

MAPPED_FRAGMENT_BYTES = 60_000_000
"""Fragments if arrays from a megabyte on are mapped one by one, as measured."""


def fragment_bytes(*, heap: int, mapped: int, peak: int, lasting: int) -> int:
    """Return the bytes that the CPU allocator holds beyond the peak of the arrays in use.

    Args:
        heap: Most bytes in arrays of the heap, at any moment.
        mapped: Most bytes in larger arrays, at any moment.
        peak: Most bytes of both together, at any moment.
        lasting: Bytes in the heap that are allocated during training, and stay.
    """
    return (
        max(0, heap + mapped - peak)
        + FRAGMENT_BYTES
        + int(FRAGMENTS * heap + LASTING_FRAGMENTS * lasting)
    )
