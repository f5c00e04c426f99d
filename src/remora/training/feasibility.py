"""Whether a run fits: its device and precision, and its plan against memory and disk."""

from __future__ import annotations

import torch

from remora.config import TrainConfig
from remora.data.dataset import Dataset
from remora.errors import ResourceError
from remora.formatting import spoken_bytes
from remora.models import hub, quantize
from remora.models.loading import load_prompt
from remora.planning import plan
from remora.planning.planner import Planner
from remora.runtime import memory
from remora.runtime.device import Precision, choose_device, choose_precision, hardware_here
from remora.runtime.reporter import Reporter


def choose_arithmetic(
    config: TrainConfig, num_devices: int, reporter: Reporter
) -> tuple[torch.device, Precision]:
    """Return the device and the precision of a run, and report them.

    Raises:
        ConfigError: If the device is missing, or cannot do what is asked for.
    """
    device = choose_device(config.device)
    memory.begin(device)
    if config.method == "qlora":
        quantize.require(device)
    full = config.method == "full"
    precision = choose_precision(device, config.precision, trains_base=full)
    name = device.type if num_devices == 1 else f"{num_devices} times {device.type}"
    reporter.say(f"computing on {name}: {precision}")
    return device, precision


def plan_run(
    config: TrainConfig,
    dataset: Dataset,
    precision: Precision,
    device: torch.device,
    reporter: Reporter,
    *,
    num_processes: int = 1,
) -> tuple[plan.Plan, plan.Heaviest]:
    """Plan the run before any weights are fetched, and refuse it if it cannot fit.

    Raises:
        ResourceError: If nothing that the settings allow fits into memory.
    """
    folder = hub.find(config.model, weights=False)
    prompt = load_prompt(config, dataset.labels, folder)
    planner = Planner(
        config,
        dataset,
        prompt,
        folder,
        precision,
        hardware_here(device),
        num_processes=num_processes,
    )
    planned = planner.make()
    needed = spoken_bytes(planned.peak_bytes)
    each = "" if num_processes == 1 else f" in each of {num_processes} processes"
    if not planned.fits:
        assert planned.available_bytes is not None
        raise ResourceError(
            f"training needs {needed} of memory{each}, "
            f"{spoken_bytes(planned.available_bytes)} are available; what fits, the cheapest "
            f"first: {', or '.join(planned.alternatives)}"
        )
    reporter.say(
        f"plan: {needed} peak memory{each}, micro-batches of at most "
        f"{planned.micro_batch_tokens:,} tokens, checkpointing "
        f"{'on' if planned.checkpointing else 'off'} ({planned.why})"
    )
    return planned, planner.heaviest(planned)


def refuse_full_disk(planned: plan.Plan, config: TrainConfig) -> None:
    """Refuse a run whose directory does not fit on the disk.

    Raises:
        ResourceError: If the plan says that it does not.
    """
    if not planned.fits_disk:
        raise ResourceError(
            f"the run needs {spoken_bytes(planned.disk_bytes)} of disk, "
            f"{spoken_bytes(planned.free_disk_bytes)} are free in {config.output}; free space, or "
            "choose another folder with --output"
        )
