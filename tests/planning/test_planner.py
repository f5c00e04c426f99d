"""The plan of a run: what fits, what it says, and what does not fit.

Also covers remora.planning.plan, alternatives, process_memory, survey and timing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from remora.config import PlanConfig
from remora.errors import ConfigError
from remora.planning import plan, planner, timing

TABLE = "text,label\n" + "".join(
    f"my card {i},card\nmy refund {i} is late,refund\n" for i in range(20)
)


@pytest.fixture
def weightless(base, tmp_path):
    """The base model's folder without its weights, and a table."""
    folder = tmp_path / "weightless"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "table.csv").write_text(TABLE)
    return {"data": str(tmp_path / "table.csv"), "model": str(folder)}


def planned(weightless, **settings):
    settings = {"epochs": 3, **settings}
    return planner.make_plan(PlanConfig(weightless["data"], model=weightless["model"], **settings))


def test_a_plan_needs_no_weights_and_sums_up(weightless):
    made = planned(weightless, device="t4", rank=8)
    assert made.fits
    assert made.peak_bytes == sum(made.to_dict()["memory"].values())
    assert made.memory.adapter == made.adapter_bytes_32 == 4 * made.trainable
    assert made.memory.optimizer == 8 * made.trainable
    # Two layers of r * (in + out): q, o 64; k, v 48; gate, up, down 80.
    assert made.trainable == 2 * 8 * (2 * 64 + 2 * 48 + 3 * 80)
    assert made.precision.startswith("float16 arithmetic")
    assert "loss scaling" in made.precision
    assert made.tree_tokens < made.padded_tokens
    assert "published" in made.seconds_are


def test_what_trains_in_full_is_stored_in_float32(weightless):
    lora, full = (planned(weightless, device="t4", method=name) for name in ("lora", "full"))
    assert full.trainable == full.parameters == lora.parameters - lora.trainable
    assert full.memory.adapter == 4 * full.parameters
    assert "float32 weights" in full.precision


def test_the_copy_of_the_best_weights_and_the_checkpoints_are_counted(weightless):
    with_rows = planned(weightless, device="t4", method="full")
    without = planned(weightless, device="t4", method="full", validation_fraction=0.0)
    assert with_rows.memory.best == 4 * with_rows.parameters
    assert without.memory.best == 0
    assert with_rows.measurable_bytes == with_rows.peak_bytes - 850_000_000
    assert with_rows.download_bytes == 4 * with_rows.parameters  # stored in float32
    assert with_rows.disk_bytes == 40 * with_rows.parameters


def test_the_disk_is_looked_at_where_the_run_will_be(weightless, tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return SimpleNamespace(free=1_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    made = planned(weightless, device="t4", output=tmp_path / "not" / "there")
    assert asked[-1] == tmp_path
    assert made.free_disk_bytes == 1_000
    assert not made.fits_disk


def test_less_memory_gives_smaller_micro_batches_then_alternatives(weightless):
    roomy = planned(weightless, device="t4", batch_size=32)
    assert not roomy.checkpointing
    graphs = roomy.memory.graphs
    assert graphs >= roomy.memory.saved_activations > 0
    rest = f"{(roomy.peak_bytes - graphs // 2) / 1e6}MB"
    without = planned(weightless, device="t4", batch_size=32, device_memory=rest)
    assert without.memory.graphs == 0
    assert without.micro_batch_tokens == roomy.micro_batch_tokens
    assert not without.checkpointing
    tight_bytes = without.peak_bytes - roomy.memory.saved_activations // 2
    tight = planned(weightless, device="t4", batch_size=32, device_memory=f"{tight_bytes / 1e6}MB")
    assert tight.fits
    assert tight.checkpointing or tight.largest_micro_batch < roomy.largest_micro_batch
    on = planned(weightless, device="t4", checkpointing="on")
    assert on.checkpointing
    assert on.memory.saved_activations < roomy.memory.saved_activations
    none = planned(weightless, device="t4", device_memory="1MB")
    assert not none.fits
    assert "with --rank 4" not in " ".join(none.alternatives)
    assert none.alternatives[-1].startswith("a device with ")
    assert roomy.device == "Tesla T4"


def test_alternatives_are_only_such_as_the_other_settings_allow(weightless):
    """qlora's weights are not sharded, so it is none where sharding was asked for."""
    made = planned(weightless, device="t4", shard="on", devices=2, device_memory="1MB")
    assert not made.fits
    assert "--method qlora" not in " ".join(made.alternatives)
    assert made.alternatives[-1].startswith("a device with ")


@pytest.mark.parametrize("amount", ["16", "much", "0GB", "-1GB"])
def test_an_amount_of_memory_that_is_none_is_refused(amount):
    with pytest.raises(ConfigError, match=r"device_memory is .* give an amount such as 16GB"):
        PlanConfig("t.csv", model="m", device_memory=amount)


def test_amounts_of_memory_are_decimal_or_binary():
    for amount, wanted in (("16GB", 16 * 10**9), ("1.5 GiB", 3 << 29), ("900m", 900 * 10**6)):
        assert PlanConfig("t.csv", model="m", device_memory=amount).memory_bytes() == wanted


def test_the_verb_prints_json_on_standard_output_only(weightless, capsys, monkeypatch):
    from remora.cli import app, main

    monkeypatch.setattr(app, "config", ())
    arguments = ["plan", weightless["data"], "--model", weightless["model"], "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*arguments, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True
    assert min(told[f"{part}seconds"] for part in ("", "validation_", "test_")) > 0
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*arguments, "--checkpointing", "on"])
    assert "checkpointing on" in capsys.readouterr().out


def test_the_plan_counts_evaluations_and_the_rows_scored_at_the_end(weightless):
    """Of 40 rows 32 train, in 1 step for each of 3 epochs; 4 validate and 4 test."""
    made = planned(weightless, device="t4")
    assert (made.num_steps, made.num_evaluations) == (3, 3)
    assert (made.eval_rows, made.num_scored_rows) == (4, 8)
    assert made.run_tokens == pytest.approx(3 * 32 * made.tree_tokens)
    assert made.message_tokens + made.answer_tokens < made.eval_tokens
    assert made.message_tokens + made.answer_tokens < made.scored_tokens
    few = planned(weightless, device="t4", eval_rows=2, eval_steps=2)
    assert (few.num_evaluations, few.eval_rows) == (2, 2)
    none = planned(weightless, device="t4", validation_fraction=0.0, test_fraction=0.5)
    assert (none.num_evaluations, none.eval_rows, none.num_scored_rows) == (0, 0, 20)


def test_the_time_of_a_run_is_that_of_its_tokens(weightless):
    made = planned(weightless, device="t4")
    rates = plan.Rates(training=0.003, scoring=0.001)
    whole = made.duration(rates)
    assert whole.training == pytest.approx(0.003 * made.run_tokens)
    assert whole.validation == pytest.approx(0.001 * 3 * 4 * made.eval_tokens)
    assert whole.test == pytest.approx(0.001 * 8 * made.scored_tokens)
    assert whole.total == whole.training + whole.validation + whole.test
    rest = made.duration(rates, num_steps=2, num_processes=2, num_scored=0)
    assert rest.training == pytest.approx(whole.training / 3)
    assert rest.validation == pytest.approx(whole.validation / 3)
    assert rest.test == 0


@pytest.mark.parametrize(("method", "share"), [("lora", 1 / 2), ("full", 1 / 3)])
def test_a_published_rate_gives_the_time_of_scoring_too(weightless, method, share):
    """A forward pass is half the operations of a step on a frozen base, else a third."""
    share *= 1.4  # passes of a search are smaller
    made = planned(weightless, device="t4", method=method)
    rate = made.seconds / made.run_tokens
    assert made.validation_seconds == pytest.approx(share * rate * 12 * made.eval_tokens)
    assert made.test_seconds == pytest.approx(share * rate * 8 * made.scored_tokens)
    assert made.estimated.total > made.seconds


def test_label_nodes_are_about_those_that_were_measured():
    """Tokens of a row beyond its message, in runs on Banking77 with 484 nodes in the trie."""
    answers = [[label, *range(6), 9] for label in range(66)] + [[99] * 23]
    measured = {16: (352, 30.5), 30: (257, 16.5), 91: (57.6, 9.6)}  # the last: of the end
    for num_seen, (scored, evaluated) in measured.items():
        found = timing.label_nodes(answers, 8.8, num_seen * 256, 0.01)
        assert found[1] == pytest.approx(scored, rel=0.35)
        assert found[0] >= evaluated * 0.9
    for tolerance, scored in ((0, 484), (0.1, 110), (1, 13)):
        found = timing.label_nodes(answers, 8.8, 30 * 256, tolerance)
        assert found[1] == pytest.approx(scored, rel=0.35)
    assert timing.label_nodes(answers, 8.8, 10**9, 0.01) == pytest.approx((8.8, 1.3 * 8.8))


def test_times_are_told_by_part():
    time = plan.Duration(training=480.0, validation=125.0, test=0.2)
    assert str(time) == "10 min (8.0 min training, 2.1 min validation)"
    assert str(plan.Duration(training=0.1, validation=0.0, test=0.0)) == "1 s"
