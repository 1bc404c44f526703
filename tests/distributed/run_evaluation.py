"""A published folder in this layout: what every rank bounds of some sequences."""

from tests.distributed.in_layout import model_in_layout, write_found
from tests.distributed.launch import own_jobs


def check(folder: str, *model_and_layout) -> None:
    with model_in_layout(*model_and_layout) as model:
        texts = ["1 2 3 4 5 6 7", " ".join(str(n % 30) for n in range(40))]
        write_found(folder, model, [unit.record() for unit in model.nll(texts, mc_samples=16, batch_size=5)])


if __name__ == "__main__":
    for job in own_jobs():
        check(*job)
