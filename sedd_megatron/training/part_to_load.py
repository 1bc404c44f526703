"""What of a checkpoint a run takes: all of it, or with --finetune, --no-load-optim and --skip-train a part."""

import enum
from pathlib import Path

from sedd_megatron.config import PretrainOptions
from sedd_megatron.errors import UserError
from sedd_megatron.training.going_back import named_checkpoint


class Part(enum.Enum):
    """A part of a checkpoint, and what people are told of the folder that it is taken from."""

    RUN = "resumes from {}"
    WITHOUT_OPTIMIZER = "resumes from {}, without the optimizer's state"
    MODEL = "evaluates {}"  # weights and their average
    WEIGHTS = "starts at iteration 0 with the weights of {}"

    @property
    def words(self) -> str:
        """With a place for the folder."""
        return self.value

    @property
    def is_same_run(self) -> bool:
        """Whether it is gone on with, on the same data."""
        return self in (Part.RUN, Part.WITHOUT_OPTIMIZER)


def part_to_load(options: PretrainOptions, folder: Path) -> Part:
    """What to take of the checkpoint in `folder`. Of what lies in --save all: a command line that is given again, as by
    Slurm or torchrun, goes on from there, whatever it began with.
    """
    checkpoint = options.checkpoint
    if options.training.skip_train:
        return Part.MODEL
    if checkpoint.save is not None and folder.parent.resolve() == Path(checkpoint.save).resolve():
        return Part.RUN
    if checkpoint.finetune:
        return Part.WEIGHTS
    return Part.RUN if checkpoint.load_optim else Part.WITHOUT_OPTIMIZER


def check_part_is_from_elsewhere(options: PretrainOptions, load: Path | None) -> None:
    """Check that --save does not hold what a part is taken of: the first start and the next could not be told apart.

    Raises:
        UserError: it does.
    """
    checkpoint = options.checkpoint
    if checkpoint.save is None or load is None or (checkpoint.load_optim and not checkpoint.finetune):
        return
    save, flag = Path(checkpoint.save), "--finetune" if checkpoint.finetune else "--no-load-optim"
    if load.resolve() == save.resolve() or named_checkpoint(save, load) is not None:
        raise UserError(
            f"{flag}: --load {load} is of --save {save}, from which the same command goes on with all that it holds; "
            "save to another folder"
        )
