"""A plan as it is printed."""

from __future__ import annotations

from dataclasses import fields

from display.test_evaluation_results import printed
from remora.display.plan_results import show_plan
from remora.planning.plan import Components, Plan


def plan(available_bytes: int) -> Plan:
    memory = {each.name: 100_000_000 for each in fields(Components)}
    return Plan(
        model="base",
        device="Tesla T4",
        is_cuda=True,
        precision="float16 arithmetic",
        parameters=1_000,
        trainable=5,
        adapter_bytes_32=20,
        adapter_bytes_16=10,
        num_rows=90,
        prefix_tokens=12,
        message_tokens=8.0,
        answer_tokens=2.0,
        padded_tokens=30.0,
        tree_tokens=10.0,
        operations_per_example=2e9,
        num_steps=6,
        batch_size=32,
        run_tokens=1_920.0,
        num_evaluations=3,
        eval_rows=40,
        eval_tokens=9.0,
        num_scored_rows=200,
        scored_tokens=15.0,
        micro_batch_tokens=2048,
        largest_micro_batch=1_500,
        checkpointing=False,
        shard=False,
        why="it fits",
        memory=Components(**memory),
        available_bytes=available_bytes,
        disk_bytes=1_000,
        free_disk_bytes=500,
        download_bytes=0,
        seconds=300.0,
        validation_seconds=60.0,
        test_seconds=120.0,
        seconds_are="from a table",
        alternatives=("with --checkpointing on",),
    )


def test_a_plan_that_fits_says_where() -> None:
    shown = printed(show_plan, plan(16_000_000_000))
    assert "1.10 GB of 16.00 GB" in shown  # eleven components of 100 MB
    assert "1,000, of which 5 trainable (0.50%): 20 B in 32 bits, 10 B in 16 bits" in shown
    assert "30.0 padded, 10.0 in trees (3.0 times fewer)" in shown
    assert "6 steps of 32 rows, 3 evaluations of 40, 200 held-out rows: 8.0 min (5.0 min " in shown
    assert "training, 60 s validation, 2.0 min scoring held-out rows), from a table" in shown
    assert "500 B free: TOO LITTLE" in shown
    assert shown.rstrip().endswith("fits on Tesla T4")


def test_a_plan_that_does_not_fit_lists_alternatives() -> None:
    shown = printed(show_plan, plan(1_000_000_000))
    assert shown.rstrip().endswith(
        "does not fit on Tesla T4; alternatives, cheapest first:\n  with --checkpointing on"
    )
