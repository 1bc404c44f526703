"""What --save and --load mean; one rank's choice counts for all."""

from tests.distributed.launch import launch


def test_save_and_load_mean_what_they_say(tmp_path):
    launch("run_resume_rules.py", 1, [[str(tmp_path)]])


def test_a_run_starts_from_what_is_named(tmp_path):
    launch("run_starts.py", 1, [[str(tmp_path)]])


def test_a_runs_folder_is_understood_and_nothing_in_it_lost(tmp_path):
    launch("run_run_folder.py", 1, [[str(tmp_path)]])


def test_the_first_rank_chooses_for_all(tmp_path, byte_corpus):
    small = ("--num-layers 1 --hidden-size 8 --num-attention-heads 2 --cond-dim 2 --seq-length 8 --global-batch-size 4 "
             "--micro-batch-size 2 --make-vocab-size-divisible-by 8 --lr 1e-3 --lr-warmup-iters 1 --eval-interval 0 "
             "--ema-decay 0.5 --device cpu --tensor-model-parallel-size 2 --data-path").split()  # fmt: skip
    steps = ("unbroken", "other", "training", "damage", "not finite", "sampling", "sampling around damage",
             "one machine's mistake", "different models")  # fmt: skip
    launch("run_one_choice.py", 2, [[step, [*small, str(byte_corpus)], str(tmp_path)] for step in steps], timeout=120)
