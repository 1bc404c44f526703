"""A training run from the command line: every check that needs no GPU and no other rank, then the loop."""

from pathlib import Path
from typing import Any

from sedd_megatron.arguments import weighted_corpora
from sedd_megatron.config import PretrainOptions
from sedd_megatron.data.blend import common_tokenizer
from sedd_megatron.data.tokenizers import Tokenizer, build_tokenizer
from sedd_megatron.data.windows import open_windows
from sedd_megatron.errors import UserError
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import choose_device, parallel_groups


def pretrain(options: PretrainOptions) -> int:
    """Train, or verify the layout, as `options` say; returns the exit code, 1 for a layout that failed.

    Raises:
        UserError: a mistake that a person can mend; on every rank, and before process groups or GPU memory are taken
            wherever the mistake can be seen before.
    """
    device = choose_device(options.parallel.device)
    if device.type == "cpu":
        # Before the first import of a Megatron module: some of them look at torch.cuda when they are imported.
        cpu_backend.install()
    from sedd_megatron.model.layer_spec import check_transformer_engine
    from sedd_megatron.training.loop import train
    from sedd_megatron.training.verify_layout import verify_layout

    check_transformer_engine(options.precision, device)
    tokenizer = data_tokenizer(options)
    windows = open_windows(
        weighted_corpora(options.data),
        seq_length=options.model.seq_length,
        split=options.data.split,
        num_tokens=tokenizer.num_tokens,
        seed=options.training.seed,
    )
    if options.verify.verify_layout:
        return 0 if verify_layout(options, windows, tokenizer) else 1
    checkpoint = checkpoint_to_resume(options, tokenizer.num_tokens)
    _check_log_folders(options)
    num_chunks = options.parallel.num_model_chunks(options.model.num_layers)
    with parallel_groups(options.parallel, num_chunks) as groups:
        train(options, windows, tokenizer, checkpoint, groups)
    return 0


def data_tokenizer(options: PretrainOptions) -> Tokenizer:
    """The tokenizer kept beside the data, or for data that has none the one that the flags describe."""
    data = options.data
    if data.tokenizer_type is None:
        return common_tokenizer([prefix for _, prefix in weighted_corpora(data)])
    return build_tokenizer(data.tokenizer_type, data.tokenizer_model, data.vocab_file, data.merge_file)


def checkpoint_to_resume(options: PretrainOptions, num_tokens: int) -> Path | None:
    """The checkpoint folder that --load means, checked against the options; None to start anew.

    Raises:
        UserError: no checkpoint, another model's, or a --save folder that belongs to another run.
    """
    from sedd_megatron.training.checkpoint import LATEST, check_same_model, latest_checkpoint
    from sedd_megatron.training.checkpoint_format import read_manifest

    save, load = options.checkpoint.save, options.checkpoint.load
    if save and (Path(save) / LATEST).exists() and (load is None or Path(load).resolve() != Path(save).resolve()):
        raise UserError(
            f"--save {save}: holds another run's checkpoints; add --load {save} to continue it, "
            "or save to another folder"
        )
    if load is None:
        return None
    directory = latest_checkpoint(Path(load))
    body: dict[str, Any] = read_manifest(directory)
    check_same_model(body, options, num_tokens, directory)
    return directory


def _check_log_folders(options: PretrainOptions) -> None:
    for flag, folder in (
        ("--save", options.checkpoint.save),
        ("--log-dir", options.logging.log_dir),
        ("--tensorboard-dir", options.logging.tensorboard_dir),
    ):
        if folder is None:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{flag} {folder}: cannot be made ({error.strerror}); name a folder you may write to"
            ) from error
