"""python -m sedd_megatron.plan: which layouts of a run fit on a cluster, how long they take, and what to type."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sedd_megatron.config import GROUPS, ConfigFile, PretrainOptions
from sedd_megatron.errors import UserError, print_output, run_command
from sedd_megatron.megatron_flags import answer_of
from sedd_megatron.options import check_rules, flag_of, load_yaml_options, option, parse_options
from sedd_megatron.planning.devices import DEVICES, Cluster
from sedd_megatron.planning.layouts import LAYOUT_NAMES, all_plans, best_plans, nearest_line
from sedd_megatron.planning.table import command_lines, layout_flags, plan_lines
from sedd_megatron.preset_files import config_file
from sedd_megatron.training_config import DataOptions

MOST_GPUS = 2**20


@dataclass(frozen=True)
class PlanOptions:
    """Cluster; a layout's options that the command line gives are kept, the others are planned"""

    gpus: int = option(8, "GPUs in all")
    gpu: str = option("h100", "their kind", choices=tuple(DEVICES))
    gpus_per_node: int = option(8, "GPUs that NVLink joins")
    num_tokens: int = option(50_257, "tokens of the vocabulary; GPT-2's if not given")
    storage_bandwidth: float = option(10.0, "GB/s with which all ranks together write a checkpoint")
    top: int = option(10, "layouts to print at most")
    layout: int = option(1, "which of them to print the command lines of")


@dataclass(frozen=True)
class PlannedDataOptions(DataOptions):
    """Data; nothing of it is read"""

    data_path: tuple[str, ...] = option(("data/mine_text_document",), "as in training")


OPTION_CLASSES = tuple(PlannedDataOptions if cls is DataOptions else cls for cls in GROUPS)


class Checked(NamedTuple):
    """The flags, and which options of a layout are to stay as they are."""

    options: PlanOptions
    run: PretrainOptions
    kept: frozenset[str]


def check(argv: Sequence[str]) -> Checked:
    """The flags by themselves.

    Raises:
        UserError: the first mistake.
    """
    options, config, *groups = parse_options(
        (PlanOptions, ConfigFile, *OPTION_CLASSES),
        argv,
        "sedd_megatron.plan",
        "Plan a run's layout on a cluster.",
        answer_of,
    )
    check_rules(
        options,
        [
            ("gpus", 1 <= options.gpus <= MOST_GPUS, f"must be at least 1 and at most {MOST_GPUS:,}"),
            ("gpus_per_node", 1 <= options.gpus_per_node <= 1024, "must be at least 1 and at most 1,024"),
            ("num_tokens", 2 <= options.num_tokens <= 2**31, f"must be at least 2 and at most {2**31:,}"),
            ("storage_bandwidth", 1e-6 <= options.storage_bandwidth <= 1e9, "must be between 1e-6 and 1e9 GB/s"),
            ("top", 1 <= options.top <= 1000, "must be at least 1 and at most 1,000"),
            ("layout", 1 <= options.layout <= options.top, f"must be at least 1 and at most --top {options.top}"),
        ],
    )
    given = {name for name in LAYOUT_NAMES if _names(argv, name)}
    if config.config is not None:
        # No flag unsets these.
        in_file = load_yaml_options(config_file(config.config), (PlanOptions, ConfigFile, *OPTION_CLASSES))
        given |= {name for name in LAYOUT_NAMES if "recompute" in name or "virtual" in name} & in_file.keys()
    return Checked(options, PretrainOptions(*groups), frozenset(given))


def main() -> None:
    """Print the plan, or in one line why there is none."""
    argv = sys.argv[1:]
    options, run, kept = check(argv)
    cluster = Cluster(options.gpus, options.gpus_per_node, DEVICES[options.gpu])
    plans = all_plans(run, cluster, options.num_tokens, kept)
    best = best_plans(plans)[: options.top]
    if not best:
        raise UserError(nearest_line(plans))
    if options.layout > len(best):
        raise UserError(f"--layout {options.layout}: {len(best)} fit; name one of these")
    for line in plan_lines(best, options.num_tokens, options.storage_bandwidth * 1e9):
        print_output(line)
    chosen = best[options.layout - 1]
    flags = [*_flags_of_the_run(argv, run), *layout_flags(chosen.options, run)]
    print_output(f"\nto train in layout {options.layout}, on each node, or once under Slurm:")
    for line in command_lines(chosen, flags):
        print_output(line)


def _names(argv: Sequence[str], name: str) -> bool:
    """Whether the command line gives an option, in any of the ways that it may."""
    flags = (flag_of(name), flag_of(f"no_{name}"))
    return any(argument.split("=")[0] in flags for argument in argv)


def _flags_of_the_run(argv: Sequence[str], run: PretrainOptions) -> list[str]:
    """The command line without what is the plan's own, and with what every run has."""
    own = {flag_of(name) for name in PlanOptions.__dataclass_fields__}
    flags, is_own = [], False
    for argument in argv:
        if argument.startswith("--"):
            is_own = argument.split("=")[0] in own
        if not is_own:
            flags.append(argument)
    if not _names(argv, "data_path"):
        flags += [flag_of("data_path"), *run.data.data_path]
    return flags if run.checkpoint.save is not None else [*flags, "--save", "runs/mine"]


if __name__ == "__main__":
    run_command(main)
