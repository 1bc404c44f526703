"""What --save and --load mean; one rank's choice counts for all."""

from tests.distributed.launch import launch


def test_save_and_load_mean_what_they_say(tmp_path):
    launch("run_resume_rules.py", 1, [[str(tmp_path)]])
