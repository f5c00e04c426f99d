"""The command line: each verb parses, calls one library function, and prints.

Everything heavy is imported inside the verbs, so that `remora --help` is instant.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import cyclopts
from cyclopts import App, Parameter
from cyclopts.config import Toml
from cyclopts.exceptions import UnusedCliTokensError

import remora
from remora.config import (
    ChooseConfig,
    CompareConfig,
    DiagnoseConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    PredictConfig,
    PushConfig,
    ReportConfig,
    RetrainConfig,
    ReviewConfig,
    ServeConfig,
    TrainConfig,
    TuneConfig,
)
from remora.config.help_pages import EXAMPLES, GROUPS, REST, examples
from remora.errors import ConfigError, RemoraError, ResourceError
from remora.formatting import listed, one_line
from remora.runtime import launch
from remora.runtime.stop import Stop, Terminated, interruptible

if TYPE_CHECKING:
    from remora.evaluation.findings import NextStep

app = App(
    name="remora",
    help="Turn a large language model into a text classifier by training a small LoRA adapter.",
    version=remora.__version__,
    suppress_keyboard_interrupt=False,  # `main` says it in a line
)
app.meta.suppress_keyboard_interrupt = False


@app.command(help_epilogue=examples("plan"))
def plan(config: PlanConfig) -> None:
    """Plan a training run without weights: its memory, time and settings, and why.

    Takes the settings of train.
    """
    from remora import display
    from remora.planning import planner

    with display.TerminalReporter().live() as reporter:
        made = planner.make_plan(config, say=reporter.say)
    if config.json:
        _print_json(made.to_dict())
    else:
        display.show_plan(made)


@app.command(help_epilogue=examples("train"))
def train(
    config: TrainConfig, *, json: Annotated[bool, Parameter(group=GROUPS["Output"])] = False
) -> None:
    """Train an adapter, or all weights, on a table of texts and labels, and measure the result.

    Writes model, evaluation and settings to a run directory.

    Parameters
    ----------
    json:
        Write the figures as JSON to standard output.
    """
    if config.devices > 1 and launch.world_size() == 1:
        raise SystemExit(launch.run(config.devices, sys.argv[1:]))
    stop = Stop()  # for signals outside the run, which has its own
    with stop.listening():
        from remora import display
        from remora.diagnosis import learning_curve
        from remora.evaluation import next_steps
        from remora.training.run import train

        curve = None
        with display.TerminalReporter().live() as reporter:
            if config.learning_curve:
                result, curve = learning_curve.learn(config, reporter=reporter)
            else:
                result = train(config, reporter=reporter)
        with stop.deferred():  # all is done, so show it even if a signal comes
            steps = next_steps.told_next_steps(
                lambda: next_steps.find_next_steps(result.directory), reporter.say
            )
            if json:
                more = {"learning_curve": curve.to_dict()} if curve else {}
                _print_json(result.to_dict() | more | _as_json(steps))
                return
            display.show_result(result)
            if curve:
                display.show_learning_curve(curve)
            display.show_next_steps(steps)


@app.command(help_epilogue=examples("tune"))
def tune(config: TuneConfig) -> None:
    """Search settings on the validation rows, and train with the best; the same command resumes.

    Takes the settings of train. The test rows are measured once, at the end.
    """
    from remora import display
    from remora.evaluation import next_steps
    from remora.training import tune

    with display.TerminalReporter().live() as reporter:
        tuned = tune.tune(config, reporter=reporter)
    steps = next_steps.told_next_steps(
        lambda: next_steps.find_next_steps(Path(tuned.run)), reporter.say
    )
    if config.json:
        _print_json(tuned.to_dict() | _as_json(steps))
    else:
        display.show_tuned(tuned)
        display.show_next_steps(steps)


@app.command(help_epilogue=examples("choose"))
def choose(config: ChooseConfig) -> None:
    """Find the smallest model that clears a bar: baselines first, then models from cheap to dear.

    Takes the settings of train. Every run is an ordinary one; the same command resumes.
    """
    from remora import display
    from remora.training import choose

    with display.TerminalReporter().live() as reporter:
        choice = choose.choose(config, reporter=reporter)
    if config.json:
        _print_json(choice.to_dict())
    else:
        display.show_choice(choice)


@app.command(name="eval", help_epilogue=examples("eval"))
def evaluate(config: EvalConfig) -> None:
    """Measure a trained model on a table of texts and labels."""
    from remora import display
    from remora.serving import predict

    with display.TerminalReporter().live() as reporter:
        metrics, reliability = predict.evaluate_adapter(config, reporter=reporter)
    if config.json:
        _print_json(metrics.to_dict() | {"reliability": reliability.to_dict()})
    else:
        display.show_metrics(metrics, "test")
        display.show_levels(metrics)
        display.show_reliability(reliability)


@app.command(help_epilogue=examples("predict"))
def predict(config: PredictConfig) -> None:
    """Classify messages as they arrive, from a table or from standard input."""
    from remora import display

    if config.engine == "ray":
        from remora.serving import ray_engine

        with display.TerminalReporter().status_line() as reporter:
            ray_engine.write_parts(config, reporter)
        return
    from remora.serving import predict

    predict.write_predictions(config, sys.stdout, display.TerminalReporter().say)


@app.command(help_epilogue=examples("compare"))
def compare(config: CompareConfig) -> None:
    """Compare runs side by side: does the bigger model earn its keep?"""
    from remora import display
    from remora.evaluation import compare, next_steps
    from remora.report import pages
    from remora.runtime import files

    if config.report:
        files.check_output(config.report, "--report")
    comparison = compare.compare_runs(config)
    steps = next_steps.told_next_steps(
        lambda: next_steps.after_comparison(comparison, config.runs),
        display.TerminalReporter().say,
    )
    if config.report:
        pages.write_comparison(config.report, comparison, config.runs, steps)
    if config.json:
        _print_json(comparison.to_dict() | _as_json(steps))
    else:
        display.show_comparison(comparison)
        if config.report:
            display.show_line(f"report in {config.report}")
        display.show_next_steps(steps)


@app.command(help_epilogue=examples("diagnose"))
def diagnose(config: DiagnoseConfig) -> None:
    """Find out why a model makes mistakes, and which rows to check."""
    from remora import display
    from remora.diagnosis import diagnose
    from remora.evaluation import next_steps
    from remora.report import pages

    if config.apply is not None:
        reporter = display.TerminalReporter()
        path, num_corrected, num_deleted = diagnose.apply_corrections(config, reporter=reporter)
        counts = {"num_corrected": num_corrected, "num_deleted": num_deleted}
        if config.json:
            _print_json({"output": str(path)} | counts)
        else:
            rows = "row" if num_corrected == 1 else "rows"
            told = f"{num_corrected:,} {rows} corrected, {num_deleted:,} deleted"
            display.show_line(f"{told} in {path}")
        return
    with display.TerminalReporter().live() as reporter:
        diagnosis = diagnose.diagnose_run(config, reporter=reporter)
        pages.refresh(config.run, reporter.say)
    steps = next_steps.told_next_steps(lambda: next_steps.find_next_steps(config.run), reporter.say)
    if config.json:
        _print_json(diagnosis.to_dict() | _as_json(steps))
    else:
        display.show_diagnosis(diagnosis, config.run)
        display.show_next_steps(steps)


@app.command(help_epilogue=examples("review"))
def review(config: ReviewConfig) -> None:
    """Decide on the rows that look mislabelled, on a page in the browser."""
    from remora import display
    from remora.review.session import Review

    summary = Review(config, say=display.TerminalReporter().say).run()
    if config.json:
        _print_json(summary.to_dict())
    else:
        display.show_review(summary)


@app.command(help_epilogue=examples("retrain"))
def retrain(config: RetrainConfig) -> None:
    """Train a run again on its rows as corrected, and say what that changes.

    Settings, validation rows and test rows are those of the run.
    """
    from remora import display
    from remora.runtime import run_directory

    devices = run_directory.read_settings(config.run).devices
    if devices > 1 and launch.world_size() == 1:
        raise SystemExit(launch.run(devices, sys.argv[1:]))
    stop = Stop()
    with stop.listening():
        from remora.evaluation import next_steps
        from remora.training import retrain

        with display.TerminalReporter().live() as reporter:
            result, change = retrain.retrain_run(config, reporter=reporter)
        with stop.deferred():
            steps = next_steps.told_next_steps(
                lambda: next_steps.find_next_steps(result.directory), reporter.say
            )
            if config.json:
                _print_json(result.to_dict() | {"change": change.to_dict()} | _as_json(steps))
                return
            display.show_result(result)
            display.show_change(change)
            display.show_next_steps(steps)


@app.command(help_epilogue=examples("export"))
def export(config: ExportConfig) -> None:
    """Write a run's model as one plain folder, or its adapter as a smaller one, and measure it."""
    from remora import display
    from remora.export import export

    with display.TerminalReporter().live() as reporter:
        written = export.export_run(config, reporter=reporter)
    if config.json:
        _print_json(written.to_dict())
    else:
        display.show_export(written)


@app.command(help_epilogue=examples("push"))
def push(config: PushConfig) -> None:
    """Publish a run's model and its model card on the Hugging Face Hub, privately by default."""
    from remora import display
    from remora.export import push

    published = push.push_run(config, reporter=display.TerminalReporter())
    if config.json:
        _print_json(published.to_dict())
    else:
        display.show_push(published)


@app.command(help_epilogue=examples("report"))
def report(config: ReportConfig) -> None:
    """Write a run's report.html again, with the diagnosis if there is one."""
    from remora import display
    from remora.report import pages

    written = pages.write_report(config)
    if config.json:
        _print_json({"report": str(written)})
    else:
        display.show_line(f"report in {written}")


@app.command(help_epilogue=examples("serve"))
def serve(config: ServeConfig) -> None:
    """Serve many adapters of one base model over HTTP; finishes open requests on SIGTERM.

    Reloads adapters whose folders were replaced on SIGHUP.
    """
    from remora import display
    from remora.serving import server

    with server.ended_by_sigterm():
        server.Service(config, say=display.TerminalReporter().say).run()


for _place, _verb in enumerate(EXAMPLES):
    app[_verb].sort_key = _place
app["--help"].group = app["--version"].group = REST
app.register_install_completion_command(
    group=REST, help="Complete verbs and flags in this shell (bash, zsh or fish) from now on."
)


class _Settings(Toml):
    """A settings file. Empty lists are dropped: cyclopts 4 would read one as a list of a list."""

    def _load_config(self, path: Path) -> dict[str, Any]:
        try:
            loaded = super()._load_config(path)
        except ValueError as error:  # of TOML, or of UTF-8
            raise ConfigError(f"{path} is not valid TOML ({one_line(error)}); correct it") from None
        return {name: value for name, value in loaded.items() if value != []}


@app.meta.default
def _main(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(group=REST)] = None,
    debug: Annotated[bool, Parameter(group=REST)] = False,
) -> None:
    """Parse the flags that all verbs share.

    Parameters
    ----------
    config:
        TOML file of settings, named like the flags; flags override it.
    debug:
        Show the traceback of an error.
    """
    if config is not None:
        if not config.is_file():
            raise ConfigError(f"there is no settings file {config}; correct --config")
        app.config = (_Settings(config, use_commands_as_keys=False),)
    app(_with_dashes_last(tokens), exit_on_error=False, print_error=False)


def _with_dashes_last(tokens: Sequence[str]) -> list[str]:
    """Return arguments with `-`, standard input, behind `--`: the parser takes it for a flag."""
    others = [token for token in tokens if token != "-"]
    if "--" in others or len(others) == len(tokens):
        return list(tokens)
    return [*others, "--", *["-"] * (len(tokens) - len(others))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console's own encoding may lack characters
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    app.config = ()
    try:
        with interruptible():
            app.meta(given, exit_on_error=False, print_error=False)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as head, has ended
        return 0
    except KeyboardInterrupt as asked:
        is_term = isinstance(asked, Terminated)
        how, code = ("stopped (SIGTERM)", 143) if is_term else ("interrupted", 130)
        return _fail(f"{how}; run the same command again", code)
    except (RemoraError, cyclopts.CycloptsError) as error:
        if "--debug" in given:
            raise
        if not isinstance(error, RemoraError):
            return _fail(_as_line(error, given), ConfigError.exit_code)
        return _fail(str(error), error.exit_code) if launch.speaks(error) else error.exit_code
    except (OSError, MemoryError, RuntimeError) as error:
        told = None if "--debug" in given else _exhausted(error)
        if told is None:
            raise
        return _fail(told, ResourceError.exit_code)
    finally:
        _settle(sys.stdout)
        _settle(sys.stderr)
    return 0


def _exhausted(error: BaseException) -> str | None:
    """Return a sentence on memory or a disk that does not suffice; None of another error."""
    from remora.runtime import files, memory

    if isinstance(error, OSError):
        where = error.filename or "standard output"
        can_write = error.errno not in files.CANNOT_WRITE
        return None if can_write else f"cannot write to {where} ({error.strerror}); free space"
    if not memory.is_exhausted(error):
        return None
    return (
        "out of memory; give fewer --micro-batch-tokens or a smaller model, or find what fits with "
        "`remora plan`"
    )


def _settle(stream: TextIO) -> None:
    """Drop what a stream still holds and cannot write: Python would fail over it at the exit."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _as_line(error: cyclopts.CycloptsError, given: Sequence[str]) -> str:
    """Return an error of the command line in our form: what is wrong, and what to do."""
    if isinstance(error.__cause__, RemoraError):
        return str(error.__cause__)
    command = " ".join(["remora", *(error.command_chain or ())])
    if isinstance(error, cyclopts.MissingArgumentError) and error.argument is not None:
        name = error.argument.name
        if error.argument.index is not None:  # given by its place
            name = name.removeprefix("--").upper()
        elif name in given:
            return f"{name} has no value; see `{command} --help`"
        return f"`{command}` needs {name}; see `{command} --help`"
    if isinstance(error, UnusedCliTokensError):
        tokens = listed(list(error.unused_tokens or ()))
        more = f"quote a name with spaces, or see `{command} --help`"
        return f"`{command}` has no use for {tokens}; {more}"
    if str(error).startswith("Dictionary of tokens"):  # cyclopts takes a dot for another level
        example = '--label-texts \'{"v1.0": "version one"}\''
        return f"a flag names a label that has a dot; give all in JSON, such as {example}"
    return str(error)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # of a full disk behind standard error
        print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    return code


def _as_json(steps: Sequence[NextStep]) -> dict[str, Any]:
    return {"next_steps": [each.to_dict() for each in steps]}


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201
