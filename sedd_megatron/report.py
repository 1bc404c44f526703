"""python -m sedd_megatron.report RUN...: one page (HTML) with the curves and samples of runs, for any browser."""

import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from sedd_megatron.errors import run_command, say
from sedd_megatron.options import option, parse_options
from sedd_megatron.output_files import check_output, write_whole
from sedd_megatron.reporting.page import report_page
from sedd_megatron.reporting.records import read_run
from sedd_megatron.run_files import METRICS


@dataclass(frozen=True)
class ReportOptions:
    """Runs and output"""

    runs: tuple[str, ...] = option(MISSING, f"save folders of runs, or their {METRICS}; --runs itself may be left out")
    output: str = option("report.html", "the page")


def check(argv: Sequence[str]) -> ReportOptions:
    """The flags, before anything is read.

    Raises:
        UserError: the first mistake.
    """
    (options,) = parse_options((ReportOptions,), _with_flag(argv), "sedd_megatron.report", "Show runs on one page.")
    files = [("a run", str(Path(run) / METRICS if os.path.isdir(run) else run)) for run in options.runs]
    check_output("--output", options.output, files)
    return options


def main() -> None:
    """Read the runs, write the page."""
    options = check(sys.argv[1:])
    runs = [read_run(Path(run)) for run in options.runs]
    for run in runs:
        for fault in run.faults:
            say(f"warning: {fault}", to_stderr=True)
    write_whole("--output", Path(options.output), report_page(runs))
    say(f"wrote {options.output}")


def _with_flag(argv: Sequence[str]) -> list[str]:
    """Runs that stand before or behind the flags, or between, as values of --runs."""
    if "--runs" in argv:
        return list(argv)
    flags, runs, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            runs.append(argument)
            continue
        flags.append(argument)
        # Each flag has one value.
        if "=" not in argument and argument != "--help" and rest:
            flags.append(rest.pop(0))
    return [*(["--runs", *runs] if runs else []), *flags]


if __name__ == "__main__":
    run_command(main)
