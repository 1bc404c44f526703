"""python -m sedd_megatron.plan: which layouts of a run fit on a cluster, how long they take, and what to type."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sedd_megatron.arguments import DATA_OF_PARTS
from sedd_megatron.config import GROUPS, ConfigFile, PretrainOptions
from sedd_megatron.errors import UserError, print_output, run_command
from sedd_megatron.megatron_flags import answer_of
from sedd_megatron.options import check_rules, flag_of, load_yaml_options, option, parse_options
from sedd_megatron.planning.devices import DEVICES, Cluster
from sedd_megatron.planning.layouts import LAYOUT_NAMES, all_plans, best_plans, nearest_line
from sedd_megatron.planning.table import command_lines, layout_flags, plan_lines
from sedd_megatron.preset_files import config_file

MOST_GPUS = 2**20
# What a run has to have, where the command line has none of it.
DATA_PATH, SAVE, NUM_TOKENS = "data/mine_text_document", "runs/mine", 50_257


@dataclass(frozen=True)
class PlanOptions:
    """Cluster; a layout's options that the command line gives are kept, the others are planned; no data is read"""

    gpus: int = option(8, "GPUs in all")
    gpu: str = option("h100", "their kind", choices=tuple(DEVICES))
    gpus_per_node: int = option(8, "GPUs that NVLink joins")
    num_tokens: int | None = option(
        None, f"tokens of the vocabulary; those of --vocab-size, or GPT-2's {NUM_TOKENS:,} if not given"
    )
    storage_bandwidth: float = option(10.0, "GB/s with which all ranks together write a checkpoint")
    top: int = option(10, "layouts to print at most")
    layout: int = option(1, "which of them to print the command lines of")


class Checked(NamedTuple):
    """The flags, which options of a layout are to stay as they are, and the flags that a run needs besides."""

    options: PlanOptions
    run: PretrainOptions
    kept: frozenset[str]
    added: tuple[str, ...]


def check(argv: Sequence[str]) -> Checked:
    """The flags by themselves.

    Raises:
        UserError: the first mistake.
    """
    options, config, *groups = parse_options(
        (PlanOptions, ConfigFile, *GROUPS),
        argv,
        "sedd_megatron.plan",
        "Plan a run's layout on a cluster.",
        answer_of,
    )
    given_tokens = NUM_TOKENS if options.num_tokens is None else options.num_tokens
    check_rules(
        options,
        [
            ("gpus", 1 <= options.gpus <= MOST_GPUS, f"must be at least 1 and at most {MOST_GPUS:,}"),
            ("gpus_per_node", 1 <= options.gpus_per_node <= 1024, "must be at least 1 and at most 1,024"),
            (
                "num_tokens",
                2 <= given_tokens <= 2**31,
                f"must be at least 2 and at most {2**31:,}",
            ),
            ("storage_bandwidth", 1e-6 <= options.storage_bandwidth <= 1e9, "must be between 1e-6 and 1e9 GB/s"),
            ("top", 1 <= options.top <= 1000, "must be at least 1 and at most 1,000"),
            ("layout", 1 <= options.layout <= options.top, f"must be at least 1 and at most --top {options.top}"),
        ],
    )
    given = {name for name in LAYOUT_NAMES if _names(argv, name)}
    if config.config is not None:
        # No flag unsets these.
        in_file = load_yaml_options(config_file(config.config), (PlanOptions, ConfigFile, *GROUPS))
        given |= {name for name in LAYOUT_NAMES if "recompute" in name or "virtual" in name} & in_file.keys()
    run, added = PretrainOptions(*groups), ()
    if not any(getattr(run.data, name) for name in ("data_path", *DATA_OF_PARTS, "mock_data")):
        run, added = replace(run, data=replace(run.data, data_path=(DATA_PATH,))), (flag_of("data_path"), DATA_PATH)
    if run.checkpoint.save is None:
        run, added = replace(run, checkpoint=replace(run.checkpoint, save=SAVE)), (*added, flag_of("save"), SAVE)
    return Checked(options, run, frozenset(given), added)


def main() -> None:
    """Print the plan, or in one line why there is none."""
    argv = sys.argv[1:]
    options, run, kept, added = check(argv)
    num_tokens = options.num_tokens or run.data.vocab_size or NUM_TOKENS
    cluster = Cluster(options.gpus, options.gpus_per_node, DEVICES[options.gpu])
    plans = all_plans(run, cluster, num_tokens, kept)
    best = best_plans(plans)[: options.top]
    if not best:
        raise UserError(nearest_line(plans))
    if options.layout > len(best):
        raise UserError(f"--layout {options.layout}: {len(best)} fit; name one of these")
    for line in plan_lines(best, num_tokens, options.storage_bandwidth * 1e9):
        print_output(line)
    chosen = best[options.layout - 1]
    flags = [*_flags_of_the_run(argv), *added, *layout_flags(chosen.options, run)]
    print_output(f"\nto train in layout {options.layout}, on each node, or once under Slurm:")
    for line in command_lines(chosen, flags):
        print_output(line)


def _names(argv: Sequence[str], name: str) -> bool:
    """Whether the command line gives an option, in any of the ways that it may."""
    flags = (flag_of(name), flag_of(f"no_{name}"))
    return any(argument.split("=")[0] in flags for argument in argv)


def _flags_of_the_run(argv: Sequence[str]) -> list[str]:
    """The command line without what is the plan's own."""
    own = {flag_of(name) for name in PlanOptions.__dataclass_fields__}
    flags, is_own = [], False
    for argument in argv:
        if argument.startswith("--"):
            is_own = argument.split("=")[0] in own
        if not is_own:
            flags.append(argument)
    return flags


if __name__ == "__main__":
    run_command(main)
