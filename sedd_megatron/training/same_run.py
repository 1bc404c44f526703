"""Whether a checkpoint is of the run at hand: what may not differ, what may if a person says so, what is reported.

Everything that no list here has is free to change: the layout, micro-batches, recompute, devices, loaders, and what is
saved and logged.
"""

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from sedd_megatron.arguments import DATA_OF_PARTS, corpora_by_flag
from sedd_megatron.config import GROUPS, ModelOptions, PretrainOptions
from sedd_megatron.data.digests import DIGESTED, file_record, written_digests
from sedd_megatron.data.null_tokenizer import NullTokenizer
from sedd_megatron.data.object_storage import read_bytes, remote_bin
from sedd_megatron.data.splits import WHOLE
from sedd_megatron.data.tokenizer_folder import DESCRIPTION
from sedd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from sedd_megatron.data.windows import has_keyed_order
from sedd_megatron.errors import UserError, one_line
from sedd_megatron.options import flag_of
from sedd_megatron.training.run_folder import FoundCheckpoint
from sedd_megatron.training_config import CHANGES_TO_ALLOW

# The model's own: with another of these its tensors do not fit, or mean something else.
FIXED = (
    "num_layers hidden_size num_attention_heads ffn_hidden_size cond_dim make_vocab_size_divisible_by graph noise "
    "noise_eps sigma_min sigma_max"
).split()
# What people change on purpose in the middle of a run. They are told.
REPORTED = (
    "hidden_dropout bf16 transformer_impl fp8_format fp8_recipe fp8_amax_history_len fp8_amax_compute_algo "
    "fp8_param_gather train_iters train_samples lr min_lr lr_decay_style lr_decay_iters lr_decay_samples "
    "lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples lr_warmup_iters lr_warmup_samples lr_warmup_fraction "
    "lr_warmup_init clip_grad adam_beta1 adam_beta2 adam_eps weight_decay ema_decay ema_interval spike_factor"
).split()
# In place of a corpus: made-up data is the same wherever its seed is.
MOCK = {"share": "1", "sample": "mock data", "digests": None, "keyed_order": False}
# Of a file of data without digests, this many blocks of this many bytes, evenly spaced, stand for all of it.
BLOCKS, BLOCK_BYTES = 64, 1 << 16


def describe_run(options: PretrainOptions, num_tokens: int) -> dict[str, Any]:
    """What of a run is kept in its checkpoints to know it again, but for the tokenizer: options, size of the
    vocabulary, and of each corpus its share, the digests beside it if there are any, one of its sizes and a sample of
    its bytes, whether its windows are read in the order that needs no table, and which part of the data it is where
    --split does not decide that.
    """
    data = [] if not options.data.mock_data else [MOCK]
    for flag, corpora in corpora_by_flag(options.data).items():
        total, is_split = sum(weight for weight, _ in corpora), flag == flag_of("data_path")
        split = options.data.split if is_split else WHOLE
        for weight, prefix in corpora:
            found = {
                "share": str(weight / total),
                "sample": _sample_digest(prefix),
                "digests": _token_digests(prefix),
                "keyed_order": has_keyed_order(prefix, options.model.seq_length, split),
            }
            data.append(found if is_split else found | {"part": flag})
    return {"options": options.to_dict(), "num_tokens": num_tokens, "data": data}


def tokenizer_records(tokenizer: Tokenizer) -> dict[str, Any]:
    """Size and sha256 of each file that the tokenizer's description folder has, by name, as in a checkpoint's state.

    Raises:
        UserError: there is no room for it among the temporary files.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            return save_tokenizer(tokenizer, Path(folder) / "tokenizer")
    except OSError as error:
        raise UserError(
            f"cannot write the tokenizer to a temporary folder: {one_line(error)}; make room there, or name another "
            "folder by TMPDIR"
        ) from error


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write the tokenizer's description into a new folder; returns the records of its files."""
    tokenizer.save(folder)
    return {path.name: file_record(path) for path in sorted(folder.iterdir())}


def check_same_run(
    found: FoundCheckpoint, own: dict[str, Any], subject: str, way_out: str, is_same_run: bool = True
) -> list[str]:
    """Check that a checkpoint may be continued by the run that `own` describes; what people are told has changed.

    Args:
        own: `describe_run`, with the `tokenizer_files`.
        subject, way_out: the beginning and the end of an error's line: "--load X: it", "leave --load out".
        is_same_run: False where the model alone is taken, which has to be the same, and its tokenizer.

    Raises:
        UserError: naming the first difference that is not in --allow-changed.
    """
    saved = found.body["state"]
    allowed = own["options"]["allow_changed"]
    difference = first_difference(saved, own, allowed, is_same_run)
    if difference is None and "tokenizer" not in allowed:
        difference = _tokenizer_difference(found, own)
    if difference is not None:
        name, words = difference
        exception = f", --allow-changed {name} to go on with the change" if name in CHANGES_TO_ALLOW else ""
        raise UserError(f"{subject} {words}; give the same{exception}, or {way_out}")
    return changes(saved, own) if is_same_run else []


def first_difference(
    saved: dict[str, Any], own: dict[str, Any], allowed: tuple[str, ...], is_same_run: bool = True
) -> tuple[str, str] | None:
    """The first thing but the tokenizer by which a checkpoint's state is of another run: its name, and in words."""
    if saved["num_tokens"] != own["num_tokens"]:
        words = f"has a vocabulary of {saved['num_tokens']} tokens, the data one of {own['num_tokens']}"
        return "num_tokens", words
    theirs, ours = _comparable(saved), _comparable(own)
    names = (
        FIXED
        if has_no_run(saved) or not is_same_run
        else [*FIXED, *(name for name in CHANGES_TO_ALLOW if name in ours)]
    )
    for name in names:
        unknown = name == "data_path" and "data" not in saved
        if name in allowed or unknown or theirs[name] == ours[name]:
            continue
        if name == "data_path":
            if _is_same_data(theirs[name], ours[name]):
                continue
            words = f"was trained on other data than {_data_flags(own)}"
            if _data_flags(saved) == _data_flags(own) and not own["options"]["mock_data"]:
                words += ", whose content has changed since"
        else:
            words = f"was trained with {flag_of(name)} {theirs[name]}, this run has {ours[name]}"
        return name, words
    if is_same_run and "data_path" not in allowed and _has_another_order(saved, own):
        return "data_path", "read its windows in the order that releases before 0.8 gave so many"
    return None


def changes(saved: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Every option that a run may change on resuming and that has changed, as "--lr 0.001 -> 0.0005"."""
    if has_no_run(saved):
        return []
    theirs, ours = _comparable(saved), _comparable(own)
    found = [f"{flag_of(name)} {theirs[name]} -> {ours[name]}" for name in REPORTED if theirs[name] != ours[name]]
    for name in own["options"]["allow_changed"]:
        if name in ours and theirs[name] != ours[name] and name != "data_path":
            found.append(f"{flag_of(name)} {theirs[name]} -> {ours[name]}")
    if _has_another_order(saved, own):
        found.append("another order of the windows")
    before, now = _data_flags(saved), _data_flags(own)
    if before != now:
        found.append(f"{before} -> {now.removeprefix(flag_of('data_path') + ' ')}")
    return found


def has_no_run(state: dict[str, Any]) -> bool:
    """Whether a checkpoint was converted from another format and not trained here: it has a model's options alone."""
    return "data_path" not in state["options"]


def _has_another_order(saved: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether an older release, which had a table for every order, read what is now read in the order without one."""
    is_older = not all("keyed_order" in corpus for corpus in saved.get("data", [{}]))
    return is_older and not has_no_run(saved) and any(corpus["keyed_order"] for corpus in own["data"])


def _listed(value: Any) -> list[str]:
    # A string in the checkpoints of before 0.4, which knew no blends.
    return [value] if isinstance(value, str) else list(value)


def _data_flags(state: dict[str, Any]) -> str:
    """The flags that name a run's data, with their values; an older checkpoint knows --data-path alone."""
    options = state["options"]
    named = [name for name in ("data_path", *DATA_OF_PARTS) if options.get(name)]
    flags = [f"{flag_of(name)} {' '.join(_listed(options[name]))}" for name in named]
    return " ".join(flags) or flag_of("mock_data")


def _comparable(state: dict[str, Any]) -> dict[str, Any]:
    """A state's options by name, as JSON gives them; an option that it lacks, being newer, has its default."""
    options = {field.name: field.default for cls in GROUPS for field in dataclasses.fields(cls)} | state["options"]
    options["ffn_hidden_size"] = ModelOptions(
        hidden_size=options["hidden_size"], ffn_hidden_size=options["ffn_hidden_size"]
    ).mlp_hidden_size
    if options["train_samples"] is not None:
        options["train_iters"] = None
    # By what is in it, wherever it lies; older checkpoints do not know.
    options["data_path"] = state.get("data")
    return json.loads(json.dumps(options, default=str))


def _is_same_data(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> bool:
    """Digests count where both have them: a copy may have been made without them."""
    return len(theirs) == len(ours) and all(
        (one["share"], one["sample"], one.get("part")) == (other["share"], other["sample"], other.get("part"))
        and (None in (one["digests"], other["digests"]) or one["digests"] == other["digests"])
        for one, other in zip(theirs, ours, strict=True)
    )


def _tokenizer_difference(found: FoundCheckpoint, own: dict[str, Any]) -> tuple[str, str] | None:
    records = found.body["state"]["tokenizer_files"]
    if records == own["tokenizer_files"]:
        return None
    tokenizer = load_tokenizer(found.folder / "tokenizer")
    # Token ids in place of text: a converted model whose folder had no tokenizer.
    if isinstance(tokenizer, NullTokenizer):
        return None
    # Written by another version of a library, perhaps: as this one writes it, then.
    records = tokenizer_records(tokenizer)
    for name in sorted(records.keys() | own["tokenizer_files"].keys(), key=lambda name: (name == DESCRIPTION, name)):
        if records.get(name) != own["tokenizer_files"].get(name):
            return "tokenizer", f"has another tokenizer than the data ({name} differs)"
    return None


def _token_digests(prefix: str) -> list[str] | None:
    """The written sha256 of .bin and .idx; the tokenizer is compared by itself."""
    digests = written_digests(prefix)
    return None if digests is None else [digests[suffix] for suffix in DIGESTED]


def _sample_digest(prefix: str) -> str:
    digest = hashlib.sha256()
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        remote = remote_bin(prefix) if path.suffix == ".bin" else None
        size = path.stat().st_size if remote is None else remote.size
        digest.update(f"{path.suffix} {size} ".encode())
        starts = range(0, size, BLOCK_BYTES)
        if len(starts) > BLOCKS:
            starts = [(size - BLOCK_BYTES) * block // (BLOCKS - 1) for block in range(BLOCKS)]
        if remote is not None:
            for start in starts:
                digest.update(read_bytes(remote, start, min(BLOCK_BYTES, size - start)))
            continue
        with path.open("rb") as file:
            for start in starts:
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
