"""lm-evaluation-harness over a published folder in this layout: what every rank answers."""

from tests.distributed.in_layout import model_in_layout, write_found
from tests.distributed.launch import own_jobs

SETTINGS = {"do_sample": True, "max_gen_toks": 5, "until": ["7"]}
ASKED = {
    "loglikelihood": [("1 2 3", " 4 5"), ("1 2 3", " 6"), ("", "9 9 9 8"), ("5 " * 20, "6")],
    "loglikelihood_rolling": [("1 2 3 4 5 6 7",), (" ".join(str(n % 30) for n in range(40)),)],
    "generate_until": [("1 2", SETTINGS), ("3 4", SETTINGS), ("1 2", SETTINGS | {"temperature": 0.0})],
}


def answer(folder: str, *model_and_layout) -> None:
    from lm_eval.api.instance import Instance

    from sedd_megatron.generation.settings import SamplingOptions
    from sedd_megatron.harness_model import HarnessModel, HarnessOptions

    with model_in_layout(*model_and_layout) as model:
        harness = HarnessModel(model, HarnessOptions(mc_samples=8), SamplingOptions(sampling_steps=8, batch_size=3))
        found = {
            kind: getattr(harness, kind)([Instance(kind, {}, one, 0, (kind, n, 1)) for n, one in enumerate(asked)])
            for kind, asked in ASKED.items()
        }
        write_found(folder, model, found)


if __name__ == "__main__":
    for job in own_jobs():
        answer(*job)
