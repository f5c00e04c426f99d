"""All terminal output. Nothing else imports rich."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from remora.diagnosis.curve_answer import LearningCurve
from remora.diagnosis.diagnose import Diagnosis
from remora.evaluation.calibration import Abstention, Reliability
from remora.evaluation.compare import Comparison
from remora.evaluation.metrics import Metrics
from remora.evaluation.significance import accuracy_verdict
from remora.export.compress import Compressed
from remora.export.export import Exported
from remora.export.merge import Parity
from remora.export.push import Pushed
from remora.formatting import spoken_bytes, spoken_seconds
from remora.planning.plan import Plan
from remora.runtime.reporter import Reporter, Step, Validation
from remora.training.finish import TrainResult

NUM_CONFUSIONS = 5


class TerminalReporter(Reporter):
    """Shows a run on standard error: sentences, and one progress bar."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._scoring: TaskID | None = None

    @contextlib.contextmanager
    def live(self) -> Iterator[TerminalReporter]:
        """Show the progress bar while the context lasts."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as self._progress:
            yield self
        self._progress = None

    def say(self, line: str) -> None:
        """Print a sentence."""
        self._console.print(line, markup=False, soft_wrap=True)

    def stepped(self, step: Step) -> None:
        """Move the training bar."""
        if self._progress is None:
            return
        if self._training is None:
            self._training = self._progress.add_task("train", total=step.num_steps, figures="")
        speed = f"{step.examples_per_second:.1f} examples/s  " if step.examples_per_second else ""
        figures = f"{speed}loss {step.loss:.3f}  {_bytes(step.peak_memory_bytes)} peak"
        self._progress.update(
            self._training, completed=step.step, total=step.num_steps, figures=figures
        )

    def validated(self, validation: Validation) -> None:
        """Print a line for an evaluation."""
        mark = ", the best so far" if validation.best else ""
        self.say(
            f"step {validation.step}: validation accuracy {validation.accuracy:.1%}, "
            f"log-loss {validation.log_loss:.3f}{mark}"
        )

    def scoring(self, what: str, done: int, total: int) -> None:
        """Move the bar of an evaluation, and take it away at its end."""
        if self._progress is None:
            return
        if self._scoring is None:
            self._scoring = self._progress.add_task(what, total=total, figures="")
        self._progress.update(self._scoring, completed=done)
        if done >= total:
            self._progress.remove_task(self._scoring)
            self._scoring = None


def show_plan(made: Plan, console: Console | None = None) -> None:
    """Print a plan: memory by component, then the settings with their reasons."""
    console = console or Console(highlight=False)
    table = Table("memory at its peak", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, count in vars(made.memory).items():
        table.add_row(name.replace("_", " "), spoken_bytes(count))
    available = made.available_bytes
    room = "" if available is None else f" of {spoken_bytes(available)}"
    table.add_row("together", f"{spoken_bytes(made.peak_bytes)}{room}")
    console.print(table)
    saved = made.padded_tokens / made.tree_tokens
    time = "" if made.seconds is None else f"{spoken_seconds(made.seconds)}, "
    for line in (
        f"\nparameters  {made.parameters:,}, of which {made.trainable:,} train "
        f"({made.trainable / made.parameters:.2%}); what trains takes "
        f"{spoken_bytes(made.adapter_bytes_32)} in 32 bits, "
        f"{spoken_bytes(made.adapter_bytes_16)} in 16 bits",
        f"tokens      {made.prefix_tokens} that all rows share, then a message of "
        f"{made.message_tokens:.1f} and an answer of {made.answer_tokens:.1f} on average; computed "
        f"for each row: padded {made.padded_tokens:.1f}, in trees {made.tree_tokens:.1f} "
        f"({saved:.1f} times fewer)",
        f"operations  {made.operations_per_example / 1e9:,.1f} GFLOP an example",
        f"arithmetic  {made.precision}",
        f"micro-batch at most {made.micro_batch_tokens:,} tokens (the largest has "
        f"{made.largest_micro_batch:,}), checkpointing {'on' if made.checkpointing else 'off'}: "
        f"{made.why}",
        f"time        {made.num_steps:,} steps of {made.batch_size} rows: {time}{made.seconds_are}",
        f"disk        {spoken_bytes(made.disk_bytes)} for the run, of "
        f"{spoken_bytes(made.free_disk_bytes)} that are free"
        f"{'' if made.fits_disk else ': TOO LITTLE'}; "
        f"{spoken_bytes(made.download_bytes)} to download",
    ):
        _line(console, line)
    if made.fits:
        _line(console, f"\nfits on {made.device}")
        return
    _line(console, f"\ndoes not fit on {made.device}; what would, the cheapest first:")
    for alternative in made.alternatives:
        _line(console, f"  {alternative}")


def show_result(result: TrainResult, console: Console | None = None) -> None:
    """Print what a run has shown, on standard output."""
    console = console or Console(highlight=False)
    show_metrics(result.metrics, result.measured_on, console)
    show_reliability(result.reliability, console)
    base, ours = result.baseline, result.metrics
    low, high = base.metrics.accuracy_interval
    note = ""
    if base.num_train_rows < base.num_all_train_rows:
        note = f", on {base.num_train_rows:,} of {base.num_all_train_rows:,} training rows"
    _line(
        console,
        f"baseline   {base.metrics.accuracy:.2%}  (95% interval {low:.1%} to {high:.1%})  "
        f"{base.description}, {base.seconds:.1f} s{note}",
    )
    _line(
        console,
        f"           {accuracy_verdict(ours.accuracy, base.metrics.accuracy, result.p_value)}",
    )
    size = _bytes(result.adapter_bytes)
    trained = f"model      {size}"
    if result.method != "full":
        larger = result.base_bytes / result.adapter_bytes
        trained = f"adapter    {size}, the base model is {larger:.0f} times larger"
    _line(console, f"{trained}; {result.parameters.share:.2%} of the parameters trained")
    _line(
        console,
        f"speed      {result.examples_per_second:.1f} examples/s, "
        f"{result.supervised_tokens_per_second:.0f} supervised tokens/s; "
        f"{result.num_steps} steps in {result.train_seconds:.0f} s, "
        f"{_bytes(result.peak_memory_bytes)} peak memory",
    )
    if result.speed_up is not None:
        _line(
            console,
            f"           {result.num_processes} processes, {result.speed_up:.2f} times one "
            f"({result.speed_up / result.num_processes:.0%}), estimated from the time that each "
            "computes",
        )
    _line(console, f"run        {result.directory}")
    if (page := result.directory / "report.html").is_file():
        _line(console, f"report     {page}")


def show_learning_curve(found: LearningCurve, console: Console | None = None) -> None:
    """Print what each number of rows per class gave, where that leads, and the answer last."""
    console = console or Console(highlight=False)
    table = Table(
        *("rows per class", "rows", "accuracy", "95% interval", "baseline", "p", "time"),
        box=None,
        pad_edge=False,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for size in found.sizes:
        low, high = size.accuracy_interval
        table.add_row(
            "all" if size.per_class is None else f"{size.per_class:,}",
            f"{size.num_rows:,}",
            f"{size.accuracy:.2%}",
            f"{low:.1%} to {high:.1%}",
            f"{size.baseline_accuracy:.2%}",
            f"{size.p_value:.2g}",
            spoken_seconds(size.train_seconds),
        )
    _line(console, "")
    console.print(table)
    _line(console, f"\non {found.num_measured:,} {found.measured_on} rows, the same for all sizes")
    for size in found.sizes:
        if size.num_short:
            _line(
                console,
                f"{size.spoken}: {size.num_short:,} classes have fewer and give all they have",
            )
    if further := found.extrapolation:
        low, high = further.accuracy_interval
        _line(
            console,
            f"{further.num_rows:,} rows should give {further.accuracy:.1%} ({low:.1%} to "
            f"{high:.1%}): error {further.floor:.3f} + {further.scale:.3f} "
            f"(rows / {further.num_rows // 2:,})^-{further.exponent:.2f}",
        )
    _line(console, found.caution)
    _line(console, found.answer)


def show_metrics(metrics: Metrics, measured_on: str, console: Console | None = None) -> None:
    """Print the figures of one evaluation: per class, confusions, and the summary last."""
    console = console or Console(highlight=False)
    table = Table("label", "precision", "recall", "F1", "rows", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in metrics.per_class:
        figures = (f"{row.precision:.2f}", f"{row.recall:.2f}", f"{row.f1:.2f}", f"{row.support:,}")
        table.add_row(row.label.replace("[", r"\["), *figures)
    console.print(table)
    if metrics.confused_pairs:
        console.print("\nlabels most often taken for each other")
    for pair in metrics.confused_pairs[:NUM_CONFUSIONS]:
        share = pair.count / pair.num_rows
        _line(
            console,
            f"  {pair.count:>4}  {pair.first} / {pair.second}: {pair.first_as_second} rows taken "
            f"for the second, {pair.second_as_first} for the first ({share:.0%} of their rows)",
        )
    low, high = metrics.accuracy_interval
    note = "" if measured_on == "test" else ", rows that also chose the weights: a little too good"
    _line(
        console,
        f"\naccuracy   {metrics.accuracy:.2%}  (95% interval {low:.1%} to {high:.1%})  "
        f"on {metrics.num_rows:,} {measured_on} rows{note}",
    )
    log_loss = "" if metrics.log_loss is None else f", log-loss {metrics.log_loss:.3f}"
    _line(console, f"macro-F1   {metrics.macro_f1:.2%}{log_loss}")


def show_reliability(found: Reliability, console: Console | None = None) -> None:
    """Print how far the probabilities of one evaluation can be trusted."""
    console = console or Console(highlight=False)
    scaled = ""
    if found.temperature is not None:
        scaled = (
            f"; {found.scaled_calibration_error:.3f} at temperature {found.temperature:.2f}, "
            f"fitted on {found.num_validation:,} validation rows"
        )
    _line(
        console,
        f"confidence calibration error {found.calibration_error:.3f} "
        f"(expected, {len(found.bins)} bins of equal mass){scaled}",
    )
    if found.abstention is not None:
        _line(console, f"abstain    {_abstention(found.abstention)}")
    if found.out_of_scope is not None:
        outside = found.out_of_scope
        refused = "" if outside.refused is None else f"; {outside.refused:.1%} below the threshold"
        _line(
            console,
            f"scope      AUROC {outside.auroc:.3f} by confidence, against {outside.num_rows:,} "
            f"messages out of scope{refused}",
        )


def show_comparison(found: Comparison, console: Console | None = None) -> None:
    """Print runs side by side, the pairs of them, and the answer last."""
    console = console or Console(highlight=False)
    gains = Table("run", "accuracy", "95% interval", "macro-F1", box=None, pad_edge=False)
    costs = Table(
        *("run", "trained", "artifact", "examples/s", "memory", "time"), box=None, pad_edge=False
    )
    for column in (*gains.columns[1:], *costs.columns[1:]):
        column.justify = "right"
    for each in found.contenders:
        name = each.name.replace("[", r"\[")
        low, high = each.accuracy_interval
        figures = f"{each.accuracy:.2%}", f"{low:.1%} to {high:.1%}", f"{each.macro_f1:.2%}"
        gains.add_row(name, *figures)
        costs.add_row(
            name,
            "" if each.trainable_share is None else f"{each.trainable_share:.2%}",
            "" if each.artifact_bytes is None else _bytes(each.artifact_bytes),
            "" if each.examples_per_second is None else f"{each.examples_per_second:.1f}",
            "" if each.peak_memory_bytes is None else _bytes(each.peak_memory_bytes),
            f"{each.train_seconds:.0f} s",
        )
    console.print(gains)
    console.print()
    console.print(costs)
    _line(console, f"\non {found.num_rows:,} rows, the smallest first")
    for pair in found.pairs:
        chance = f"{pair.both_wrong_by_chance:.1f} by chance"
        _line(
            console,
            f"  {pair.first} over {pair.second}: {100 * pair.difference:+.2f} points, right alone "
            f"on {pair.only_first_right} rows against {pair.only_second_right}, "
            f"p = {pair.p_value:.2g} (exact McNemar test; {pair.adjusted_p_value:.2g} over all "
            f"pairs, Holm); both wrong on {pair.both_wrong} rows ({chance}), "
            f"{pair.same_wrong_label} of them with the same label",
        )
    repeated = [each for each in found.shared_mistakes if each.count > 1]
    if repeated:
        _line(console, "\nmistakes that every run makes alike, so look at the labels first")
    for mistake in repeated:
        _line(console, f"  {mistake.count:>4}  {mistake.true} taken for {mistake.predicted}")
    _line(console, "")
    for text in (*found.notes, found.bar, found.value, found.answer):
        if text is not None:
            _line(console, text)


def show_diagnosis(found: Diagnosis, run: Path, console: Console | None = None) -> None:
    """Print the pairs of labels with their verdicts, and where the rows to look at are."""
    console = console or Console(highlight=False)
    for pair in found.pairs:
        _line(console, f"{pair.first} / {pair.second}: {pair.verdict}")
        merged = (
            f"as one label, accuracy would be {pair.accuracy_if_merged:.2%}, with the border where "
            f"the judges draw it {pair.accuracy_if_redefined:.2%}"
        )
        _line(console, f"    {pair.reason}; {merged}")
    _line(console, f"\njudged by  {found.method}")
    _line(
        console,
        f"accuracy   {found.out_of_sample_accuracy:.2%} out of sample on {found.num_rows:,} rows, "
        f"the run {found.accuracy:.2%} on held-out rows",
    )
    low, high = found.ceiling.interval
    _line(
        console,
        f"ceiling    at most {found.ceiling.accuracy:.2%} on the held-out rows (95% interval "
        f"{low:.2%} to {high:.2%}): estimated, {found.ceiling.wrong:.2%} of their labels are slips "
        f"and {found.ceiling.overlapping:.2%} on either side of an overlap",
    )
    _line(
        console,
        f"           lower as far as the labels of a further {found.ceiling.alike:.2%} are wrong, "
        "which get the same other label from every classifier; such rows may be hard instead",
    )
    _line(
        console,
        f"alike      {found.num_test_exact:,} test rows are training texts, and "
        f"{found.num_test_near:,} nearly; {found.num_conflicting:,} training rows have a near twin "
        "under another label",
    )
    if found.num_conflicts:
        _line(
            console,
            f"           of {found.num_conflicts:,} such pairs, {found.num_covered:,} have a row "
            "among the suspects or labels that overlap: recall "
            f"{found.num_covered / found.num_conflicts:.1%}",
        )
    if found.tied_tokens:
        shown = ", ".join(
            f"{each.token} ({each.label}, {each.num_rows} rows)" for each in found.tied_tokens[:5]
        )
        _line(console, f"tied       rare words that come with one label only: {shown}")
    _line(
        console,
        f"wrong      estimated, {found.wrong:.2%} of the training labels (95% interval "
        f"{found.wrong_interval[0]:.2%} to {found.wrong_interval[1]:.2%})",
    )
    _line(
        console,
        f"suspects   {len(found.suspects):,} rows in {run / 'relabel.csv'}, the likeliest first; "
        "decide in its last column, then --apply it",
    )
    if planted := found.planted:
        _line(
            console,
            f"planted    {planted.num_found:,} of the {planted.num_wrong:,} labels that are wrong "
            f"on purpose in this sample are among those: recall {planted.recall:.1%}, precision "
            f"{planted.precision:.1%}; {planted.num_suggested:,} with the right label suggested",
        )


def show_export(written: Exported, console: Console | None = None) -> None:
    """Print what was written, and how it was measured."""
    console = console or Console(highlight=False)
    result, rows = written.result, f"{written.result.num_rows:,} {written.measured_on} rows"
    if isinstance(result, Parity):
        _show_parity(result, rows, console)
    else:
        _show_compressed(result, rows, console)
    _line(console, f"written    {written.directory}, {_bytes(written.num_bytes)}")
    if written.plot:
        _line(console, f"plot       {written.plot}")


def _show_parity(found: Parity, rows: str, console: Console) -> None:
    flips = "the same label on all"
    if found.num_flips:
        flips = f"another label on {found.num_flips:,}, where two labels are nearly alike, of"
    _line(
        console,
        f"parity     {flips} {rows}; log-probabilities differ by {found.largest_difference:.2g} at "
        f"most, {found.allowed:.2g} allowed",
    )
    _line(console, f"stored in  {found.dtype}")


def _show_compressed(found: Compressed, rows: str, console: Console) -> None:
    if found.frontier:
        learned = any(point.cut_accuracy is not None for point in found.frontier)
        columns = ["size", "of the base", "mean rank", "accuracy", "other labels", ""]
        if learned:
            columns.insert(3, "cut")
        table = Table(*columns, box=None, pad_edge=False)
        for column in table.columns:
            column.justify = "right"
        for point in found.frontier:
            cells = [
                _bytes(point.num_bytes),
                f"1/{point.ratio:,.0f}",
                f"{point.mean_rank:.2f}",
                f"{point.accuracy:.2%}",
                f"{point.num_flips:,}",
                "chosen" if point.num_bytes == found.chosen.num_bytes else "",
            ]
            if learned:
                cut = point.cut_accuracy
                cells.insert(3, "" if cut is None else f"{cut:.2%}")
            table.add_row(*cells)
        again = "; after cutting, some learned again" if learned else ""
        _line(console, f"on validation rows{again}:")
        console.print(table)
        console.print()
    chosen = found.chosen
    _line(
        console,
        f"accuracy   {chosen.accuracy:.2%} on {rows}, the full adapter {found.full_accuracy:.2%}; "
        f"another label than the full one on {chosen.num_flips:,}",
    )
    _line(
        console,
        f"size       {_bytes(chosen.num_bytes)} in {found.dtype}, mean rank "
        f"{chosen.mean_rank:.2f}; the full adapter takes {_bytes(found.adapter_bytes)}, and the "
        f"base model is {chosen.ratio:,.0f} times larger",
    )


def show_push(published: Pushed, console: Console | None = None) -> None:
    """Print where an adapter was published, and how to use it from there."""
    console = console or Console(highlight=False)
    size = _bytes(sum(published.files.values()))
    _line(
        console,
        f"published  {published.url}, {'public' if published.public else 'private'}: "
        f"{len(published.files)} files, {size}",
    )
    _line(console, f"use it     remora predict {published.repo_id} < messages.txt")


def show_line(text: str) -> None:
    """Print a sentence on standard output."""
    _line(Console(highlight=False), text)


def _abstention(found: Abstention) -> str:
    """Say in a sentence what a threshold gives."""
    wanted = f"{found.wanted_accuracy:.1%} accuracy"
    if found.threshold is None:
        return f"no confidence reaches {wanted} on {found.chosen_on}; train longer or ask for less"
    chosen = f"confidence {found.threshold:.4f} for {wanted}, chosen on "
    chosen += (
        f"{found.num_chosen_on:,} validation rows"
        if found.chosen_on == "validation"
        else "these same rows, so the accuracy is a little too good"
    )
    if found.accuracy is None or found.accuracy_interval is None:
        return f"{chosen}: no row reaches it"
    low, high = found.accuracy_interval
    return (
        f"{chosen}: answers {found.coverage:.1%} of the rows, {found.accuracy:.2%} of them right "
        f"(95% interval {low:.1%} to {high:.1%})"
    )


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit != "MB" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
