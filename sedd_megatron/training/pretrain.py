"""A training run from the command line: every check that needs no GPU and no other rank, then the loop."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from sedd_megatron.arguments import corpora_by_flag, corpora_in_object_storage, weighted_corpora
from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.blend import common_tokenizer
from sedd_megatron.data.corpus import are_read_at_start, find_corpus
from sedd_megatron.data.document_ends import check_ends_of_documents
from sedd_megatron.data.mock import mock_windows
from sedd_megatron.data.null_tokenizer import NullTokenizer
from sedd_megatron.data.object_storage import copy_beside
from sedd_megatron.data.preparation import Preparation, preparation_of
from sedd_megatron.data.splits import check_tokens_of_parts, open_parts
from sedd_megatron.data.tokenizer_folder import DESCRIPTION
from sedd_megatron.data.tokenizers import Tokenizer, build_tokenizer
from sedd_megatron.data.windows import Windows
from sedd_megatron.errors import UserError, one_line, say
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import (
    ParallelGroups,
    choose_device,
    errors_of_all_ranks,
    is_first_rank,
    on_first_rank,
    parallel_groups,
    raise_on_every_rank,
    ranks_share_a_machine,
    started_ranks,
    tell,
)
from sedd_megatron.parallel.user_buffers import check_user_buffers, user_buffers

if TYPE_CHECKING:
    from sedd_megatron.training.run_folder import FoundCheckpoint
    from sedd_megatron.training.run_lock import RunLock
    from sedd_megatron.training.stop_requests import StopRequests


class Inputs(NamedTuple):
    """What a run is given on the disk."""

    tokenizer: Tokenizer
    windows: Windows
    preparation: Preparation


def pretrain(options: PretrainOptions, requests: "StopRequests | None" = None) -> int:
    """Train, or verify the layout, as `options` say; returns the exit code, 1 for a layout that failed. `requests` has
    heard signals since the command began.

    Mistakes in flags, in the layout and in the ranks' devices end a rank by itself, before anything is taken. What lies
    on the disk and what is installed may differ between machines: a rank that finds a mistake there tells the others
    once they have joined, but for those of one machine, which all see it and end by themselves. Tokens are read after
    that, each rank a part of them.

    Raises:
        UserError: a mistake that a person can mend; on every rank.
    """
    device = choose_device(options.parallel.device)
    if device.type == "cpu":
        # Before the first import of a Megatron module: some of them look at torch.cuda when they are imported.
        cpu_backend.install()
    from sedd_megatron.training.verify_layout import verify_layout

    inputs, own_error = None, None
    try:
        inputs = _open_inputs(options, device)
    except UserError as error:
        if ranks_share_a_machine():
            raise
        own_error = error
    if inputs is not None and options.verify.verify_layout:
        return 0 if verify_layout(options, inputs.windows, inputs.tokenizer) else 1
    num_chunks = options.parallel.num_model_chunks(options.model.num_layers)
    with parallel_groups(options.parallel, num_chunks) as groups:
        raise_on_every_rank(own_error)
        _train(options, inputs, groups, requests)
    return 0


def _open_inputs(options: PretrainOptions, device: torch.device) -> Inputs:
    from sedd_megatron.model.layer_spec import check_transformer_engine

    check_transformer_engine(options.precision, device)
    check_user_buffers(options.parallel, device)
    for url, place in corpora_in_object_storage(options.data).items():
        copy_beside(url, place)
    tokenizer, seq_length, seed = data_tokenizer(options), options.model.seq_length, options.training.seed
    prefixes = [prefix for _, prefix in weighted_corpora(options.data)]
    preparation = preparation_of(prefixes) if prefixes else Preparation()
    check_ends_of_documents(options.data, tokenizer, prefixes)
    if options.data.mock_data:
        tell(["--mock-data: every window is made up, and what is learned from them is good for nothing else"])
        windows = mock_windows(tokenizer.num_tokens, seq_length, seed)
    else:
        corpora, split = corpora_by_flag(options.data), options.data.split
        windows = open_parts(corpora, seq_length=seq_length, split=split, num_tokens=tokenizer.num_tokens, seed=seed)
    is_verified = options.verify.verify_layout
    # A verification begins on each rank alone; in training all ranks share the reading.
    if (is_verified or started_ranks() == 1) and _are_read_at_start(options):
        check_tokens_of_parts(windows, tokenizer.num_tokens)
    if not is_verified:
        _check_outputs(options)
    return Inputs(tokenizer, windows, preparation)


def _are_read_at_start(options: PretrainOptions) -> bool:
    return are_read_at_start(prefix for _, prefix in weighted_corpora(options.data))


def _train(options: PretrainOptions, inputs: Inputs, groups: ParallelGroups, requests: "StopRequests | None") -> None:
    from sedd_megatron.training.ending import nothing_left
    from sedd_megatron.training.loop import train
    from sedd_megatron.training.run_lock import RunLock

    tokenizer, windows, preparation = inputs
    if started_ranks() > 1 and on_first_rank(lambda: _are_read_at_start(options)):
        with errors_of_all_ranks():
            check_tokens_of_parts(windows, tokenizer.num_tokens, torch.distributed.get_rank(), started_ranks())
    is_saved = options.checkpoint.save is not None and not options.training.skip_train
    lock = RunLock(Path(options.checkpoint.save)) if is_saved and is_first_rank() else None
    try:
        # One rank looks for all: what lies on the disk may change from one look to the next.
        if options.training.skip_train:
            found = on_first_rank(lambda: choose_evaluated(options, tokenizer))
        else:
            found = on_first_rank(lambda: choose_start(options, tokenizer, lock))
        if options.training.skip_train or not nothing_left(options, found):
            with user_buffers(options, groups):
                train(options, windows, tokenizer, found, groups, preparation, lock, requests)
    finally:
        if lock is not None:
            lock.release()


def data_tokenizer(options: PretrainOptions) -> Tokenizer:
    """The tokenizer kept beside the data, or for data that has none the one that the flags describe.

    Raises:
        UserError: there is none, or both; the flags would give the data's tokens another meaning.
    """
    data, prefixes = options.data, [prefix for _, prefix in weighted_corpora(options.data)]
    for flag, corpora in corpora_by_flag(data).items():
        for _, prefix in corpora:
            find_corpus(prefix, flag)
    if data.tokenizer_type is None:
        return common_tokenizer(prefixes)
    for prefix in prefixes:
        if os.path.isfile(f"{prefix}_tokenizer/{DESCRIPTION}"):
            raise UserError(
                f"--tokenizer-type {data.tokenizer_type}: {prefix} has its own tokenizer beside it, which counts; "
                "leave the flag out"
            )
    if data.vocab_size is not None:
        return NullTokenizer(data.vocab_size)
    return build_tokenizer(data.tokenizer_type, data.tokenizer_model, data.vocab_file, data.merge_file)


def choose_start(options: PretrainOptions, tokenizer: Tokenizer, lock: "RunLock | None") -> "FoundCheckpoint | None":
    """The checkpoint that the run goes on from, checked against the options; None to start anew. On the first rank.

    Takes the lock of the --save folder and removes what a dead run left there. What --save holds counts before --load,
    so that one command line starts a run and goes on with it; but an iteration of that folder that --load names.

    Raises:
        UserError: another run saves there or did, there is no checkpoint, or none that is whole.
    """
    from sedd_megatron.training.going_back import broken_off, check_is_gone_on_from, goes_back
    from sedd_megatron.training.part_to_load import check_part_is_from_elsewhere
    from sedd_megatron.training.run_folder import (
        checkpoint_folders,
        find_checkpoint,
        named_to_load,
        remove_leftovers,
    )

    save = None if options.checkpoint.save is None else Path(options.checkpoint.save)
    load = named_to_load(options.checkpoint)
    check_part_is_from_elsewhere(options, load)
    exact, lines, held, back = options.checkpoint.exact_load, [], [], None
    if save is not None:
        lines += lock.acquire()
        try:
            lines += remove_leftovers(save)
            held = checkpoint_folders(save)
            back = goes_back(save, load) or broken_off(save)
        except OSError as error:
            raise UserError(f"--save {save}: {one_line(error)}; name a folder you may write to") from error
    if (held or back) and not options.checkpoint.resume:
        raise UserError(
            f"--save {save}: holds {(held or [back])[0].name}, and --no-resume does not go on from it; leave it out, "
            "or save to another folder"
        )
    load = back or load
    if held and back is None:
        found = find_checkpoint(save, "--save", exact)
        subject, way_out = f"--save {save}: holds another run's checkpoints; {found.folder.name}", "save elsewhere"
        if load is not None and load.resolve() != save.resolve():
            lines.append(f"--save {save} holds this run already, so that --load {load} is not read")
    elif load is None or (save is not None and load.resolve() == save.resolve()):
        found = None
    else:
        found = find_checkpoint(load, "--load", exact)
        subject, way_out = f"--load {found.folder}: it", "leave --load out to start anew"
        is_newest = bool(held) and held[0].samefile(found.folder)
        if back is not None and not is_newest:
            check_is_gone_on_from(found, options.training)
    if found is not None:
        lines += _lines_of_start(options, tokenizer, found, subject, way_out)
    for line in lines:
        say(line)
    return found


def choose_evaluated(options: PretrainOptions, tokenizer: Tokenizer) -> "FoundCheckpoint":
    """The checkpoint that --skip-train evaluates: what --save holds, as for a start, but nothing there is touched.

    Raises:
        UserError: there is no checkpoint, or it is of another model.
    """
    from sedd_megatron.training.going_back import named_checkpoint
    from sedd_megatron.training.run_folder import checkpoint_folders, find_checkpoint, named_to_load

    save = None if options.checkpoint.save is None else Path(options.checkpoint.save)
    load = named_to_load(options.checkpoint)
    is_of_save = save is not None and (load is None or named_checkpoint(save, load) is None)
    flag, root = ("--save", save) if is_of_save and checkpoint_folders(save) else ("--load", load)
    if root is None:
        raise UserError("--skip-train: neither --save nor --load holds a checkpoint; name one by --load")
    found = find_checkpoint(root, flag, options.checkpoint.exact_load)
    for line in _lines_of_start(options, tokenizer, found, f"{flag} {found.folder}: it", "name another model"):
        say(line)
    return found


def _lines_of_start(
    options: PretrainOptions, tokenizer: Tokenizer, found: "FoundCheckpoint", subject: str, way_out: str
) -> list[str]:
    from sedd_megatron.training.part_to_load import part_to_load
    from sedd_megatron.training.same_run import check_same_run, describe_run, tokenizer_records

    part = part_to_load(options, found.folder)
    own = describe_run(options, tokenizer.num_tokens) | {"tokenizer_files": tokenizer_records(tokenizer)}
    changed = check_same_run(found, own, subject, way_out, part.is_same_run)
    return [*found.lines, part.words.format(found.folder) + (f" with {', '.join(changed)}" if changed else "")]


def _check_outputs(options: PretrainOptions) -> None:
    from sedd_megatron.training.metrics import check_tensorboard
    from sedd_megatron.training.run_folder import check_is_no_checkpoint
    from sedd_megatron.training.trackers import check_trackers

    if options.training.skip_train:
        return
    if options.checkpoint.save is not None:
        check_is_no_checkpoint(Path(options.checkpoint.save))
    if options.logging.tensorboard_dir is not None:
        check_tensorboard(options.logging.tensorboard_dir)
    check_trackers(options.logging)
    for flag, folder in (
        ("--save", options.checkpoint.save),
        ("--log-dir", options.logging.log_dir),
        ("--tensorboard-dir", options.logging.tensorboard_dir),
        ("--wandb-save-dir", options.logging.wandb_save_dir),
    ):
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{flag} {folder}: cannot be made ({error.strerror}); name a folder you may write to"
            ) from error
