"""From frozen dataclasses to flags and YAML: the machinery, without any option of its own.

A command's options are frozen dataclasses whose fields are made with `option`. The field `learning_rate` becomes the
flag `--learning-rate` and the YAML key `learning_rate`; its annotation gives the type. Order of precedence: flags
over YAML over defaults.

Wherever a value comes from: whole numbers fit into 64 bits, other numbers are finite, and a str names something (a
file, a folder, a key), so that it is neither empty nor longer or deeper than a file name can be; `is_text` marks the
others.
"""

import argparse
import dataclasses
import difflib
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from sedd_megatron.errors import UserError, one_line
from sedd_megatron.preset_files import config_file, presets

# Of Linux: bytes of a path, and of a part of it between slashes.
LONGEST_PATH, LONGEST_NAME = 4095, 255
# Ours, of the parts: pathlib makes missing folders by recursion, which Python ends at 1000.
DEEPEST_PATH = 255
# Values that argparse takes for flags, unlike -1 and -0.1.
NEGATIVE_NUMBER = re.compile(r"-(\d+\.|(\d+\.?|\d*\.\d+)e[+-]?\d+|inf(inity)?|nan)", re.IGNORECASE | re.ASCII)
# Flags or keys that are told one by one.
MOST_UNKNOWN = 50


def option(
    default: Any,
    help: str,
    choices: Sequence[str] = (),
    is_text: bool = False,
    instead_of: Sequence[str] = (),
    also: Sequence[str] = (),
) -> Any:
    """A dataclass field that is also a flag; `dataclasses.MISSING` as default makes it required.

    `is_text` is for a str that names nothing, and may be empty and of any length. `instead_of` names the options in
    whose place it stands: the flag wins over those of a YAML file, and beside them it is refused. `also` are further
    names of the same option.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "is_text": is_text,
        "instead_of": tuple(instead_of),
        "also": tuple(also),
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(name: str) -> str:
    """learning_rate -> --learning-rate."""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{_beginning(message, 1000)} (--help lists every flag)")


def parse_options(
    option_classes: Sequence[type],
    argv: Sequence[str],
    prog: str,
    description: str,
    foreign: Callable[[str], str | None] = lambda flag: None,
) -> tuple[Any, ...]:
    """Parse `argv` into one instance of each class, in the order given.

    A `config` field among the classes names a YAML file whose keys are the field names. `foreign` says of a flag what
    to do in its place where another program has it, and nothing of ours.

    Raises:
        UserError: unknown flags or YAML keys, all of them; a value of the wrong type or outside the choices, a missing
            required flag.
    """
    fields = _fields_by_name(option_classes)
    parser = _build_parser(option_classes, prog, description)
    by_any_name = _fields_by_any_name(option_classes)
    flags = [flag_of(name) for name in by_any_name]
    own, unknown = _without_unknown(argv, by_any_name)
    if not {"-h", "--help"} & set(own):
        _require_known(unknown, "flag", flags, foreign)
    namespace, stray = parser.parse_known_args(own)
    _require_known(stray, "flag", flags, foreign)
    # Of --flag=-- argparse makes no value at all, in a list.
    empty = [name for name, value in vars(namespace).items() if value == []]
    if empty:
        raise UserError(f"{flag_of(empty[0])} has no value; give one, or leave it out")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(namespace).items()}
    values = given
    if given.get("config"):
        replaced = {other for name in _said(given) for other in fields[name].metadata["instead_of"]}
        of_file = load_yaml_options(config_file(given["config"]), option_classes, foreign)
        values = {name: value for name, value in of_file.items() if name not in replaced} | given
    _require_one_of_each(values, fields)
    required = [name for name in required_options(option_classes) if name not in values]
    if required:
        raise UserError(f"missing {', '.join(flag_of(n) for n in required)}: required; --help explains")
    return instances_of(values, option_classes)


def _said(values: dict[str, Any]) -> list[str]:
    """Names of the options that are not left or switched off."""
    return [name for name, value in values.items() if value is not None and value is not False]


def _require_one_of_each(values: dict[str, Any], fields: dict[str, dataclasses.Field]) -> None:
    """Refuse an option beside one in whose place it stands, whatever their values are."""
    said = _said(values)
    for name in said:
        for other in fields[name].metadata["instead_of"]:
            if other in said:
                one, two = (f"{flag_of(one)}{_shown_behind(values[one])}" for one in (name, other))
                raise UserError(f"{one} stands in place of {two}; leave one of them out")


def _shown_behind(value: Any) -> str:
    words = value if isinstance(value, tuple) else () if value is True else (value,)
    return "".join(f" {shown(word)}" for word in words)


def _without_unknown(argv: Sequence[str], fields: dict[str, dataclasses.Field]) -> tuple[list[str], list[str]]:
    """The words of ours, and the flags that are not, each once; what stands behind such a flag are its values."""
    flags = {"--help", *map(flag_of, fields), *(flag_of(f"no_{name}") for name, f in fields.items() if f.type is bool)}
    own, unknown, is_own = [], {}, True
    for word in argv:
        name = word.split("=", 1)[0]
        # As argparse tells a flag from a value.
        if name in flags or (word.startswith("--") and " " not in word):
            is_own = name in flags
            if not is_own:
                unknown.setdefault(name, word)
        if is_own and own and own[-1] in flags and NEGATIVE_NUMBER.fullmatch(word):
            own[-1] += f"={word}"
        elif is_own:
            own.append(word)
    return own, list(unknown.values())


def required_options(option_classes: Sequence[type]) -> list[str]:
    """Names of the options without a default."""
    return [name for name, f in _fields_by_name(option_classes).items() if f.default is dataclasses.MISSING]


def instances_of(values: dict[str, Any], option_classes: Sequence[type]) -> tuple[Any, ...]:
    """One instance of each class from checked values by option name."""
    return tuple(
        cls(**{f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}) for cls in option_classes
    )


def load_yaml_options(
    path: Path, option_classes: Sequence[type], foreign: Callable[[str], str | None] = lambda flag: None
) -> dict[str, Any]:
    """Read a YAML preset (safe loader) and check every key and value against the options; `foreign` as above."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"--config {path}: no such file; presets are {', '.join(presets())}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read as UTF-8 text ({error}); name another file") from error
    try:
        values = yaml.safe_load(text) or {}
    except Exception as error:  # YAML's own, and whatever Python's types say to what stands for a number or a date
        raise UserError(f"--config {path}: not valid YAML: {one_line(error, 400) or type(error).__name__}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected 'option: value' lines, found a {type(values).__name__}")
    return check_values(values, option_classes, f"--config {path}", foreign)


def check_values(
    values: dict[str, Any],
    option_classes: Sequence[type],
    where: str,
    foreign: Callable[[str], str | None] = lambda flag: None,
) -> dict[str, Any]:
    """Convert plain values (from YAML or JSON) to the options' types; `where` opens the message of an error."""
    fields = _fields_by_any_name(option_classes)
    unknown = [name for name in values if name not in fields]
    _require_known(unknown, "option", list(fields), foreign, f"{where}: ")
    checked: dict[str, Any] = {}
    for name, value in values.items():
        field = fields[name]
        if field.name in checked:
            raise UserError(f"{where}: {' and '.join(_names_of(field))} are one option; give one")
        checked[field.name] = _convert(name, value, field, where)
    return checked


def check_rules(options: Any, rules: Sequence[tuple[str, bool, str]], name_of: Callable[[str], str] = flag_of) -> None:
    """Options whose rules are (name, whether it holds, its words); `name_of` says how an error names an option.

    Raises:
        UserError: the first that does not hold.
    """
    for name, holds, rule in rules:
        if not holds:
            raise UserError(f"{name_of(name)} {getattr(options, name)} {rule}")


def shown(value: Any) -> str:
    """A value in an error: its beginning where it is long, whatever is nested in it."""
    return _beginning(value, 200) if isinstance(value, str) else in_short(value)


def in_short(value: Any) -> str:
    """repr of a value that may be of any size and depth."""
    return _SHORT.repr(value)


def _fields_by_name(option_classes: Sequence[type]) -> dict[str, dataclasses.Field]:
    return {field.name: field for cls in option_classes for field in dataclasses.fields(cls)}


def _fields_by_any_name(option_classes: Sequence[type]) -> dict[str, dataclasses.Field]:
    fields = _fields_by_name(option_classes).values()
    return {name: field for field in fields for name in _names_of(field)}


def _names_of(field: dataclasses.Field) -> list[str]:
    return [field.name, *field.metadata["also"]]


def _build_parser(option_classes: Sequence[type], prog: str, description: str) -> argparse.ArgumentParser:
    # Abbreviations are off: a preset or script must not change meaning when an option is added.
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for cls in option_classes:
        group = parser.add_argument_group((cls.__doc__ or cls.__name__).splitlines()[0])
        for field in dataclasses.fields(cls):
            _add_flag(group, field)
    return parser


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    scalar_type, is_list = _scalar_type(field)
    default = "required" if field.default is dataclasses.MISSING else f"default: {field.default}"
    arguments: dict[str, Any] = {"help": f"{field.metadata['help']} ({default})".replace("%", "%%")}
    if scalar_type is bool:
        arguments["action"] = argparse.BooleanOptionalAction
    else:
        arguments["type"] = partial(_flag_value, field=field)
        arguments["metavar"] = scalar_type.__name__.upper()
        if field.metadata["choices"]:
            arguments["choices"] = field.metadata["choices"]
            arguments["metavar"] = "|".join(field.metadata["choices"])
        if is_list:
            arguments["nargs"] = "+"
    group.add_argument(*map(flag_of, _names_of(field)), dest=field.name, **arguments)


def _scalar_type(field: dataclasses.Field) -> tuple[type, bool]:
    """(`int`, False) for `int` and `int | None`; (`str`, True) for `tuple[str, ...]`."""
    annotation = field.type
    if isinstance(annotation, types.UnionType):
        annotation = next(arg for arg in typing.get_args(annotation) if arg is not types.NoneType)
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    return annotation, False


def _convert(name: str, value: Any, field: dataclasses.Field, where: str) -> Any:
    scalar_type, is_list = _scalar_type(field)
    if value is None and field.default is None:
        return None
    if is_list:
        values = value if isinstance(value, list | tuple) else [value]
        if scalar_type is str:
            # The weights of a blend stand among its names; bool, which is an int, stays wrong.
            values = [str(one) if isinstance(one, float) or _is_int64(one) else one for one in values]
        return tuple(_convert_one(name, one, scalar_type, field, where) for one in values)
    return _convert_one(name, value, scalar_type, field, where)


def _convert_one(name: str, value: Any, scalar_type: type, field: dataclasses.Field, where: str) -> Any:
    # YAML reads 3e-4 as a string; bool is a subclass of int and must not pass for one.
    number_as_text = scalar_type in (int, float) and isinstance(value, str)
    if isinstance(value, bool) != (scalar_type is bool) or not (
        number_as_text or isinstance(value, (int, float) if scalar_type is float else scalar_type)
    ):
        raise UserError(f"{where}: {name} is {in_short(value)}, must be of type {scalar_type.__name__}")
    try:
        converted = scalar_type(value)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: {name} is {in_short(value)}, must be of type {scalar_type.__name__}") from error
    fault = _fault_of(converted, field)
    if fault is not None:
        raise UserError(f"{where}: {name} is {in_short(value)}, must {fault}")
    return converted


def _flag_value(text: str, field: dataclasses.Field) -> Any:
    """What a flag is given as, one value of it."""
    scalar_type, _ = _scalar_type(field)
    try:
        value = scalar_type(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid {scalar_type.__name__} value: {in_short(text)}") from error
    # Choices argparse knows.
    fault = None if field.metadata["choices"] else _fault_of(value, field)
    if fault is not None:
        raise argparse.ArgumentTypeError(f"{in_short(value)} must {fault}")
    return value


def _fault_of(value: Any, field: dataclasses.Field) -> str | None:
    """What a value of the right type must still be; None if it is."""
    choices = field.metadata["choices"]
    if choices:
        return None if value in choices else f"be one of {', '.join(choices)}"
    if type(value) is int:
        return None if _is_int64(value) else "fit into 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else "be finite"
    return fault_of_name(value) if isinstance(value, str) and not field.metadata["is_text"] else None


def _is_int64(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def fault_of_name(name: str) -> str | None:
    """What a name of a file, a folder or a key must still be; None if it can be one."""
    if not name:
        return "not be empty: leave it out, or give what it names"
    try:
        parts = name.encode("utf-8").split(b"/")
    except UnicodeEncodeError:
        return "be in UTF-8"
    if "\0" in name:
        return "not have a NUL character in it"
    if len(parts) > DEEPEST_PATH:
        return f"be at most {DEEPEST_PATH} parts between slashes"
    if max(map(len, parts)) > LONGEST_NAME or len(b"/".join(parts)) > LONGEST_PATH:
        return f"be at most {LONGEST_PATH} bytes long, and {LONGEST_NAME} between slashes"
    return None


class _Short(reprlib.Repr):
    """repr that stays short whatever a file holds: numbers of thousands of digits, lists in lists of themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxstring, self.maxlong = 2, 4, 4, 200, 50

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write numbers of more than 4300 digits.
        return repr(value) if value.bit_length() <= 200 else f"a number of {value.bit_length()} bits"


_SHORT = _Short()


def _require_known(
    unknown: list[Any], kind: str, known: list[str], foreign: Callable[[str], str | None], where: str = ""
) -> None:
    lines = [where + _unknown(kind, given, known, foreign) for given in unknown[:MOST_UNKNOWN]]
    if len(unknown) > MOST_UNKNOWN:
        lines.append(f"{where}and {len(unknown) - MOST_UNKNOWN} more that are unknown")
    if lines:
        raise UserError(*lines)


def _unknown(kind: str, given: Any, known: list[str], foreign: Callable[[str], str | None]) -> str:
    name = shown(given)
    answer = foreign(flag_of(given.split("=", 1)[0].removeprefix("--"))) if isinstance(given, str) else None
    if answer is not None:
        return f"{name}: {answer}"
    near = difflib.get_close_matches(name.split("=")[0], known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {kind} {name}: {hint}--help lists every flag"


def _beginning(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 4] + " ..."
