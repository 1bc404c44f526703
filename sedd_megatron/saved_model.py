"""What lies in a folder: a checkpoint of ours or a published model; its description before its weights."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedd_megatron.config import (
    DiffusionOptions,
    ModelOptions,
    ParallelOptions,
    PrecisionOptions,
    RecomputeOptions,
    model_options_from_dict,
)
from sedd_megatron.data.library_tokenizers import GPT2BPETokenizer, HuggingFaceTokenizer
from sedd_megatron.data.null_tokenizer import NullTokenizer
from sedd_megatron.data.preparation import Preparation
from sedd_megatron.data.tokenizer_folder import DESCRIPTION
from sedd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from sedd_megatron.diffusion import AbsorbingGraph, UniformGraph
from sedd_megatron.diffusion.graph import make_graph
from sedd_megatron.errors import UserError, one_line
from sedd_megatron.layout_rules import check_model_layout
from sedd_megatron.options import fault_of_name, in_short
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import (
    ParallelGroups,
    choose_device,
    on_first_rank,
    raise_on_every_rank,
    tell,
)
from sedd_megatron.pretrained import PretrainedModel
from sedd_megatron.run_files import LOST, METRICS, SAMPLES
from sedd_megatron.training_config import PARTED_DOCUMENTS

if TYPE_CHECKING:
    from sedd_megatron.model.sedd_model import SEDDModel
    from sedd_megatron.training.run_folder import FoundCheckpoint

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class SavedModel:
    """A model whose description has been read, and none of its weights."""

    path: Path
    model_options: ModelOptions
    diffusion: DiffusionOptions
    num_tokens: int
    tokenizer: Tokenizer  # as the data's texts went through it
    preparation: Preparation
    # Checks the files of weights, on every rank at once; what it returns fills this rank's part of a network.
    open_weights: Callable[[], Callable[["SEDDModel"], None]]
    # The same of the weights that a run of the published training code trained, where those are their average.
    open_trained_weights: Callable[[], Callable[["SEDDModel"], None]] | None = None
    # By which of PARTED_DOCUMENTS it was trained: documents that shared a window were not one text to it.
    parted_documents: tuple[str, ...] = ()

    @property
    def graph(self) -> AbsorbingGraph | UniformGraph:
        """Its noising graph."""
        return make_graph(self.diffusion.graph, self.num_tokens)

    def files_of_run(self) -> list[tuple[str, str]]:
        """What a run keeps beside its checkpoints, each as what it is and its path."""
        from sedd_megatron.training import going_back, metrics_file, run_folder, run_lock

        names = (run_folder.LATEST, run_folder.FINISHED, going_back.WENT_BACK, run_lock.FILE, METRICS, LOST, SAMPLES,
                 metrics_file.WRITERS, metrics_file.RUN_ID)  # fmt: skip
        return [("a file of the run", str(self.path.parent / name)) for name in names]

    def load(
        self, parallel: ParallelOptions, precision: PrecisionOptions, make_groups: Callable[[], ParallelGroups]
    ) -> PretrainedModel:
        """This rank's part of the weights in the layout of `parallel`; groups are made once the layout fits.

        Raises:
            UserError: the layout does not fit the model, or a file is damaged.
        """
        from sedd_megatron.training.build import build_model, build_schedule

        check_model_layout(self.model_options, parallel)
        groups = make_groups()
        fill = self.open_weights()
        graph = self.graph
        (network,) = build_model(self.model_options, parallel, precision, RecomputeOptions(), graph, groups)
        fill(network)
        network.eval()
        return PretrainedModel(
            network,
            graph,
            build_schedule(self.diffusion),
            self.tokenizer,
            self.model_options.seq_length,
            groups,
            self.preparation,
        )


def find_saved_model(directory: str | Path, device: str = "auto") -> SavedModel:
    """Read what a folder says of the model in it; a hub name is fetched first.

    Raises:
        UserError: no model there, or a damaged one.
    """
    fault = fault_of_name(str(directory))
    if fault is not None:
        raise UserError(f"a model's folder {in_short(str(directory))} must {fault}")
    if choose_device(device).type == "cpu":
        cpu_backend.install()
    from sedd_megatron.training.published_format import is_published_folder

    path = Path(directory)
    if not path.exists() and HUB_NAME.fullmatch(str(directory)):
        path = _fetched(str(directory))
    return _published_model(path) if is_published_folder(path) else _checkpoint(path)


def _checkpoint(path: Path) -> SavedModel:
    from sedd_megatron.training.checkpoint_checks import check_sizes
    from sedd_megatron.training.run_folder import find_checkpoint

    found = find_checkpoint(path)
    # Not among the samples.
    tell(found.lines, to_stderr=True)
    state = found.body["state"]
    model_options, diffusion = model_options_from_dict(state["options"], str(found.folder))
    check_sizes(found.body, model_options, found.folder)
    tokenizer = found.preparation.tokenizer_of_texts(load_tokenizer(found.folder / "tokenizer"))
    open_weights = partial(_open_averages, found)
    # Of trained checkpoints, and not the oldest.
    parted = tuple(name for name in PARTED_DOCUMENTS if state["options"].get(name))
    return SavedModel(
        found.folder,
        model_options,
        diffusion,
        state["num_tokens"],
        tokenizer,
        found.preparation,
        open_weights,
        parted_documents=parted,
    )


def _open_averages(own: "FoundCheckpoint") -> Callable[["SEDDModel"], None]:
    """The averages of the checkpoint that the first rank has found, or of the newest whole one before it; of the model
    and tokenizer that this rank has read already.
    """
    from sedd_megatron.training.checkpoint_format import Shard, verify_files
    from sedd_megatron.training.checkpoint_reading import read_shards
    from sedd_megatron.training.ema import KEY_PREFIX
    from sedd_megatron.training.run_folder import load_first_whole

    def check(found: "FoundCheckpoint") -> None:
        if _description(found) != _description(own):
            raise UserError(f"{found.folder}: is of another model than {own.folder}; name the one that is meant")

    def check_other_rank() -> UserError | None:
        try:
            check(found)
        except UserError as error:
            return error
        return None

    # Looked for by every rank before there were groups; a run that saves meanwhile may have shown them different ones.
    found = on_first_rank(lambda: own)
    raise_on_every_rank(check_other_rank())
    found = load_first_whole(
        found, lambda found: verify_files(found.folder, found.body), check, partial(tell, to_stderr=True)
    )

    def fill(network: "SEDDModel") -> None:
        # One call: it opens each shard file once, not once per parameter.
        averages = [Shard.of(sharded, KEY_PREFIX + sharded.key) for sharded in network.sharded_tensors().values()]
        read_shards(found.folder, found.body, averages)

    return fill


def _description(found: "FoundCheckpoint") -> tuple[Any, ...]:
    """What of a checkpoint is in a SavedModel."""
    state = found.body["state"]
    return *model_options_from_dict(state["options"], str(found.folder)), state["num_tokens"], state["tokenizer_files"]


def _published_model(path: Path) -> SavedModel:
    from sedd_megatron.training.published_format import read_published_folder

    folder = read_published_folder(path)
    tokenizer = folder.preparation.tokenizer_of_texts(_tokenizer_beside(folder.path, folder.num_tokens))
    return SavedModel(
        path,
        folder.model_options,
        folder.diffusion,
        folder.num_tokens,
        tokenizer,
        folder.preparation,
        folder.open_weights,
        None if folder.run_checkpoint is None else partial(folder.open_weights, trained=True),
        folder.parted_documents,
    )


def _tokenizer_beside(path: Path, num_tokens: int) -> Tokenizer:
    """The tokenizer whose files lie in a published folder; without any, text is token ids."""
    vocabulary, merges = path / "vocab.json", path / "merges.txt"
    if (path / "tokenizer" / DESCRIPTION).is_file():
        tokenizer: Tokenizer = load_tokenizer(path / "tokenizer")
    elif (path / "tokenizer.json").is_file():
        tokenizer = HuggingFaceTokenizer.from_name(str(path))
    elif vocabulary.is_file() and merges.is_file():
        tokenizer = GPT2BPETokenizer(vocabulary, merges)
    else:
        tokenizer = NullTokenizer(num_tokens)
    if tokenizer.num_tokens != num_tokens:
        raise UserError(
            f"{path}: its tokenizer has {tokenizer.num_tokens} tokens and its model {num_tokens}; put the model's own "
            "tokenizer there, or none"
        )
    return tokenizer


def _fetched(name: str) -> Path:
    from sedd_megatron.training.published_format import CONFIG, HUB_FILES, is_published_folder, read_published_folder

    try:
        # Imported here: with its HTTP client it takes longer than all the rest.
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(name, allow_patterns=[CONFIG]))
        if is_published_folder(path):
            # Before the weights, which may be gigabytes of another model.
            read_published_folder(path)
            snapshot_download(name, revision=path.name, allow_patterns=HUB_FILES)
    except UserError:
        raise
    except Exception as error:  # the library raises its own, its client's and the system's
        raise UserError(
            f"{name}: no such folder, and it cannot be fetched from a hub ({one_line(error)}); download it "
            "and name its folder"
        ) from error
    if not is_published_folder(path):
        raise UserError(
            f"{name}: no such folder, and the hub's repository of this name has no {CONFIG}; name a model in "
            "the published format, or a folder"
        )
    return path
