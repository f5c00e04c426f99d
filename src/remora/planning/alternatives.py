"""Settings and devices that would fit, for a run that does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from remora.errors import ConfigError
from remora.formatting import spoken_bytes
from remora.models import quantize
from remora.planning.plan import Components

if TYPE_CHECKING:
    from remora.planning.planner import Planner

CHANGES = (
    ({"micro_batch_tokens": None}, "without --micro-batch-tokens {}: costs only time"),
    ({"checkpointing": "auto"}, "without --checkpointing off: about a third more time"),
    ({"method": "lora"}, "with --method lora: usually within a point or two of full"),
    ({"method": "qlora"}, "with --method qlora: the base in 4 bits, slower"),
    ({"shard": "auto"}, "without --shard off: sharded weights, gathered layer by layer"),
    ({"rank": 4}, "with --rank 4: a smaller adapter, which may learn less"),
)
"""One setting each and what it costs, the cheapest first."""


def alternatives(planner: Planner, components: Components) -> Iterator[str]:
    """Yield what would fit, the cheapest for the user first.

    Args:
        planner: The planner of a run that does not fit.
        components: The least memory that the run needs.
    """
    yield from _other_settings(planner)
    yield from _more_devices(planner)
    yield from _other_sizes(planner, components)


def _other_settings(planner: Planner) -> Iterator[str]:
    settings = planner.settings
    for change, description in CHANGES:
        ((name, value),) = change.items()
        now = getattr(settings, name)
        if now in {value, "on"} or (name == "rank" and (now <= 4 or settings.method == "full")):
            continue
        if value == "lora" and now == "qlora":
            continue
        if value == "qlora" and planner.hardware.type not in quantize.DEVICES:
            continue
        try:
            changed = planner.changed(**change)
        except ConfigError:  # another setting does not go with it
            continue
        other = changed.make()
        if other.fits:
            yield f"{description.format(now)}; {spoken_bytes(other.peak_bytes)} at the peak"


def _more_devices(planner: Planner) -> Iterator[str]:
    """Yield the number of devices such as this one that the sharded weights would fit on."""
    sizes, hardware = planner.memory.sizes, planner.hardware
    if planner.num_processes > 1 or sizes is None or hardware.type != "cuda":
        return
    for count in (2, 4, 8):
        size, checkpointing, fits = planner.choose(count)
        if fits:
            peak = planner.memory.components(size, checkpointing, count).peak
            yield (
                f"with --devices {count}: weights sharded over {count} such devices; "
                f"{spoken_bytes(peak)} at the peak of each"
            )
            return


def _other_sizes(planner: Planner, components: Components) -> Iterator[str]:
    """Yield the largest model for this device, and the smallest device for this model."""
    available, runtime = planner.memory.available, components.runtime
    assert available is not None
    share = (available - runtime) / (components.peak - runtime)
    if share > 0:
        most = share * planner.memory.counts.total
        count = f"{most / 1e9:.2g} billion" if most >= 1e9 else f"{most / 1e6:.0f} million"
        yield f"a model of about {count} parameters or fewer"
    yield f"a device with {spoken_bytes(components.peak)} of memory"
