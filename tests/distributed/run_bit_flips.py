"""Training jobs in which bits flip; each job is a command line and its flips."""

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.training.pretrain import pretrain
from tests.distributed.bit_flips import Flip, flipped_gradients
from tests.distributed.launch import own_jobs

if __name__ == "__main__":
    for arguments, flips in own_jobs():
        with flipped_gradients([Flip(*flip) for flip in flips]):
            pretrain(parse_pretrain_options(arguments))
