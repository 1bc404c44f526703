"""R12: random values for every flag of every command."""

import dataclasses
import importlib
import random
import resource
from collections.abc import Sequence
from pathlib import Path

from tests.campaign import runs
from tests.campaign.attempts import Attempt, Row, expect
from tests.campaign.checks import expect_no_traceback, expect_refused, tail
from tests.campaign.processes import TRAIN, RealProcess, run

# By the module that has its options: the command, and the flags that it starts with.
COMMANDS = {
    "config": TRAIN,
    "prepare_data": "prepare_data",
    "generate": "generate",
    "evaluate": "evaluate",
    "convert": "convert",
    "sample_quality": "sample_quality",
}
MEMORY = 12 << 30
# Numbers of any size are asked for; every other number decides how long a command takes, and stays small.
ANY_SIZE = set(
    "seed first_sample distributed_timeout_minutes log_interval save_interval eval_interval top_k lr_decay_iters "
    "lr_warmup_iters ddp_bucket_size keep_last keep_every max_save_failures max_documents num_samples".split()
)
INTEGERS = ["-1", "0", "1", "2", "3", str(-(2**70)), "1.5", "1e3", "abc", "", "nan", "0x10", "-0", "+1", " 1"]
LARGE = [str(2**31), str(2**63 - 1), str(2**63), str(2**64), str(10**12), str(10**30), "9" * 5000]
FLOATS = "0 -0.0 -1 1 2 0.5 0.999 1e-300 1e38 1e308 1e400 inf -inf nan abc 1,5 0x1p3".split() + ["", " 1"]
# --until-half-width goes on until it is reached.
FLOATS_AT_ONCE = [value for value in FLOATS if value not in ("0.5", "0.999", "1", "2", "1e-300", " 1", "0x1p3")]
SPLITS = ["1,1,1", "1e308,1e308,1", "nan,1,1", "1,1", ",,", "0,0,0", "969,30,1", "-1,1,1", "1,0,0", "inf,1,1"]
TEXTS = [
    "",
    " ",
    "é☃",
    "\x1b[31m",
    "x" * 5000,
    "x" * 300,
    "-",
    "[MASK*3]",
    "[MASK*9999999999]",
    "{",
    "\n",
    "0.5",
]


def random_flags(attempt: Attempt) -> None:
    """A command that works, with up to four flags more."""
    dice = attempt.random
    module = dice.choice(list(COMMANDS))
    command = [COMMANDS[module], *_working(COMMANDS[module], attempt), *_random(_options_of(module), dice, attempt)]
    if attempt.number % 100 == 99:
        process = RealProcess(command, attempt.folder)
        try:
            done = process.wait(100)
        finally:
            process.end()
    else:
        done = run(command, attempt.folder, timeout=60, before=_limit_memory)
    shown = " ".join(repr(word) if len(word) < 80 else f"{word[:20]!r}... of {len(word)}" for word in command)
    expect(not done.timed_out, f"hung: {shown}: {tail(done)}")
    expect(done.code in (0, 2), f"exit code {done.code}: {shown}: {tail(done)}")
    expect_no_traceback(done)
    if done.code == 2:
        expect_refused(done)


def _limit_memory(rank: int) -> None:
    # A request that is not refused must not take the machine with it.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _working(command: str, attempt: Attempt) -> list[str]:
    base, folder = attempt.base, attempt.folder
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    return {
        TRAIN: [*runs.MODEL, "--train-iters", "2", "--data-path", str(base.data), "--save", str(folder / "save")],
        "prepare_data": ["--input", str(text), "--output-prefix", str(folder / "data" / "corpus"), "--tokenizer-type",
                         "ByteTokenizer"],
        "generate": ["--load", str(base.run), *runs.SAMPLING, "--sampling-steps", "2"],
        "evaluate": ["--load", str(base.run), "--data", str(text), "--mc-samples", "2", "--device", "cpu"],
        "convert": ["--load", str(base.run), "--to-published", str(folder / "model")],
        "sample_quality": ["--samples", str(base.folder / f"samples-{runs.STEPS}.jsonl")],
    }[command]  # fmt: skip


def _options_of(module: str) -> list[dataclasses.Field]:
    """Fields of the option classes that a module names, in a fork, where nothing minds that it is imported."""
    found: dict[str, dataclasses.Field] = {}
    for value in vars(importlib.import_module(f"sedd_megatron.{module}")).values():
        if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__.startswith("sedd_megatron"):
            own = [one for one in dataclasses.fields(value) if "help" in one.metadata]
            found.update({one.name: one for one in own})
    if module == "generate":
        from sedd_megatron.generation.requests import TextRequest
        from sedd_megatron.generation.settings import SamplingOptions

        found.update({one.name: one for cls in (TextRequest, SamplingOptions) for one in dataclasses.fields(cls)})
    return list(found.values())


def _random(options: Sequence[dataclasses.Field], dice: random.Random, attempt: Attempt) -> list[str]:
    words = []
    for one in dice.sample(list(options), min(len(options), dice.randint(1, 4))):
        flag, kind = "--" + one.name.replace("_", "-"), str(one.type)
        if kind == "<class 'bool'>" or kind == "bool":
            words.append(dice.choice((flag, flag.replace("--", "--no-", 1), f"{flag}=x")))
            continue
        values = _values(one, kind, attempt.folder)
        words.append(flag)
        words += dice.choices(values, k=dice.choice((1, 1, 2, 3)) if "tuple" in kind else 1)
    return words


def _values(one: dataclasses.Field, kind: str, folder: Path) -> list[str]:
    # Paths stay in the attempt's own folder; none is a device, and none is fetched.
    files = [str(folder / "nothing"), str(folder / "text.txt"), str(folder), str(folder / "new" / "file")]
    choices = list(one.metadata["choices"])
    if choices:
        return [*choices, *choices, "", "none"]
    if "int" in kind:
        return INTEGERS + (LARGE if one.name in ANY_SIZE else [])
    if "float" in kind:
        return FLOATS_AT_ONCE if one.name == "until_half_width" else FLOATS
    return SPLITS if one.name == "split" else [*TEXTS, *files]


ROWS = [Row("R12", "random values of every flag", random_flags, attempts=2500, short=60)]
