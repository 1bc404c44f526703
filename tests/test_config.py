"""Options: one definition gives flags, YAML and checks; every mistake gets one line with the value and the way out."""

import subprocess
import sys

import pytest
import torch

from sedd_megatron.arguments import parse_pretrain_options
from sedd_megatron.config import GROUPS, PrecisionOptions
from sedd_megatron.errors import UserError
from sedd_megatron.options import load_yaml_options
from sedd_megatron.parallel import cpu_backend
from sedd_megatron.parallel.groups import check_torch_for_gpu
from tests.distributed.launch import REPOSITORY, child_environment

CONFIGS = REPOSITORY / "examples" / "configs"
REQUIRED = ["--data-path", "x"]


def parse(*flags: str, world_size: int = 1, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
    return parse_pretrain_options([*REQUIRED, *flags])


@pytest.mark.parametrize("preset", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_are_valid(preset, monkeypatch):
    given = load_yaml_options(preset, GROUPS)
    # Among as many ranks as a machine of a few GiB can hold the largest on.
    flags = ["--config", str(preset), "--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "4"]
    parsed = parse(*flags, world_size=16, monkeypatch=monkeypatch).to_dict()
    assert given
    assert {name: parsed[name] for name in given} == given


@pytest.mark.parametrize(
    ("preset", "shape"), [("sedd-small", (12, 768, 12)), ("sedd-medium", (24, 1024, 16))]
)  # fmt: skip
def test_published_presets_have_the_published_shapes(preset, shape):
    options = parse("--config", str(CONFIGS / f"{preset}.yaml"))
    model, training = options.model, options.training
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == shape
    assert (model.cond_dim, model.seq_length, model.hidden_dropout) == (128, 1024, 0.1)
    assert (training.lr, training.lr_warmup_iters, training.lr_decay_style) == (3e-4, 2500, "constant")
    assert (training.clip_grad, training.ema_decay, training.global_batch_size) == (1.0, 0.9999, 512)
    assert model.mlp_hidden_size == 4 * model.hidden_size


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("lr: 1e-2\nseed: 7\nbf16: true\n")
    options = parse("--config", str(config), "--seed", "8", "--no-bf16")
    assert (options.training.lr, options.training.seed, options.precision.bf16) == (1e-2, 8, False)
    assert parse().training.lr == 3e-4


@pytest.mark.parametrize("name", ["skip_train", "eval_only"])
def test_an_option_has_all_of_its_names_on_the_command_line_and_in_yaml(name, tmp_path, capsys):
    flag = f"--{name.replace('_', '-')}"
    assert parse(flag).training.skip_train
    assert not parse(flag, f"--no-{flag[2:]}").training.skip_train
    config = tmp_path / "c.yaml"
    config.write_text(f"{name}: true\n")
    assert parse("--config", str(config)).training.skip_train
    # As one option: the last of both flags counts, and a flag wins over the file.
    assert not parse("--config", str(config), "--no-skip-train").training.skip_train
    assert not parse(flag, "--no-eval-only").training.skip_train
    assert "eval_only" not in parse().to_dict()
    with pytest.raises(UserError, match=f"unknown flag {flag}s: did you mean {flag}"):
        parse(f"{flag}s")
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--skip-train, --no-skip-train, --eval-only, --no-eval-only by both names: only compute the vali" in text


def test_one_option_by_two_names_in_a_file_is_refused(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("skip_train: true\neval_only: false\n")
    with pytest.raises(UserError) as error:
        parse("--config", str(config))
    assert str(error.value) == f"--config {config}: skip_train and eval_only are one option; give one"


MOCK = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "50"]
PARTS = ["--train-data-path", "a", "--valid-data-path", "b"]


def test_a_source_of_data_wins_over_a_files_and_over_what_would_cut_it(tmp_path):
    default = parse().data.split
    for name, flags in (("mock_data", MOCK), ("train_data_path", PARTS)):
        data = parse_pretrain_options(["--config", "tiny", *flags]).data
        assert (data.split, bool(getattr(data, name))) == (default, True)
    config = tmp_path / "c.yaml"
    config.write_text("train_data_path: c\nvalid_data_path: d\n")
    data = parse("--config", str(config), "--split", "1,1,1").data
    assert (data.data_path, data.train_data_path, data.valid_data_path, data.split) == (("x",), None, None, "1,1,1")
    # What is switched off says nothing.
    config.write_text("data_path: y\nsplit: 1,1,1\n")
    data = parse_pretrain_options(["--config", str(config), "--no-mock-data"]).data
    assert (data.data_path, data.split) == (("y",), "1,1,1")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([*MOCK, "--split", "1,1,1"], "--mock-data stands in place of --split 1,1,1; leave one of them out"),
        ([*PARTS, "--split", "969,30,1"], "--train-data-path a stands in place of --split 969,30,1; leave one of them"),
        ([*PARTS, *MOCK], "--train-data-path a stands in place of --mock-data; leave one of them out"),
    ],
)
def test_what_stands_in_place_of_each_other_is_not_given_together(flags, text, tmp_path):
    with pytest.raises(UserError, match=text):
        parse_pretrain_options(flags)
    # In one file, or where the flag is what the file's option stands in place of.
    config = tmp_path / "c.yaml"
    config.write_text("train_data_path: a\nsplit: 969,30,1\n")
    for argv in (["--config", str(config)], ["--config", str(config), "--split", "1,1,1"]):
        with pytest.raises(UserError, match=r"--train-data-path a stands in place of --split .*; leave"):
            parse_pretrain_options(argv)


FP8 = ["--bf16", "--fp8-format", "hybrid"]


@pytest.mark.parametrize(
    ("flags", "world_size", "text"),
    [
        (
            ["--tensor-parallel-size", "2"],
            1,
            "unknown flag --tensor-parallel-size: did you mean --tensor-model-parallel",
        ),
        (["--num-layers", "two"], 1, "argument --num-layers: invalid int value: 'two'"),
        (["--no-exit-signal-handler"], 1, "--no-exit-signal-handler: a run that is asked to end always saves; leave"),
        (["--exit-duration-in-mins", "0"], 1, "--exit-duration-in-mins 0.0 must be above 0"),
        (["--exit-interval", "0"], 1, "--exit-interval 0 must be at least 1"),
        (["--graph", "absorbing"], 1, "invalid choice: 'absorbing'"),
        (["--hidden-size", "770"], 1, "--hidden-size 770 is not a multiple of --num-attention-heads 12"),
        (["--hidden-size", "12"], 1, "rotary embedding needs an even size"),
        (["--tensor-model-parallel-size", "5"], 5, "--num-attention-heads 12 is not a multiple of --tensor-model"),
        (["--pipeline-model-parallel-size", "5"], 5, "--num-layers 12 is not a multiple of --pipeline-model"),
        (["--tensor-model-parallel-size", "2"], 3, "must divide the 3 ranks started; start a multiple of 2"),
        (["--global-batch-size", "9"], 1, "--global-batch-size 9 is not a multiple of --micro-batch-size 8 times 1"),
        (["--micro-batch-size", "0"], 1, "--micro-batch-size 0 must be at least 1"),
        (["--max-save-failures", "0"], 1, "--max-save-failures 0 must be at least 1"),
        (["--distributed-timeout-minutes", "0"], 1, "timeout-minutes 0.0 must be above 0 and at most 525,600"),
        (["--distributed-timeout-minutes", "inf"], 1, "timeout-minutes: inf must be finite"),
        (
            ["--distributed-timeout-minutes", "1", "--save", "runs"],
            2,
            "--distributed-timeout-minutes 1.0 must be at least 1.5 with --save",
        ),
        (["--lr", "-1"], 1, "--lr -1.0 must be at least 0"),
        (["--lr", "-1e-3"], 1, "--lr -0.001 must be at least 0"),
        (["--adam-eps", "-.1E2"], 1, "--adam-eps -10.0 must be above 0"),
        (["--lr", "-inf"], 1, "argument --lr: -inf must be finite"),
        (["--bf16", "-1e3"], 1, "ignored explicit argument '-1e3'"),
        (["--", "--seed", "3"], 1, "unknown flag --: "),
        (
            ["--ema-interval", "100", "--train-iters", "3", "--lr-warmup-iters", "1"],
            1,
            "--ema-interval 100 is above --train-iters 3: the average, by which models are sampled and evaluated, "
            "would stay as it began; lower it",
        ),
        (["--ema-interval", "0"], 1, "--ema-interval 0 must be at least 1"),
        (["--loss-chunk-rows", "-1"], 1, "--loss-chunk-rows -1 must be at least 0"),
        (["--num-workers", "-1"], 1, "--num-workers -1 must be at least 0"),
        (["--lr", "nan"], 1, "argument --lr: nan must be finite"),
        (["--adam-eps", "inf"], 1, "argument --adam-eps: inf must be finite"),
        (["--lr", "1e400"], 1, "argument --lr: inf must be finite"),
        (["--seed=--"], 1, "--seed has no value; give one, or leave it out"),
        (["--save", ""], 1, "argument --save: '' must not be empty: leave it out, or give what it names"),
        (["--data-path", "0.5", "", "0.5", "b"], 1, "argument --data-path: '' must not be empty"),
        (["--load", "x" * 5000], 1, "must be at most 4095 bytes long, and 255 between slashes"),
        (["--seed", str(2**63)], 1, "argument --seed: 9223372036854775808 must fit into 64 bits"),
        (["--seed", "-1"], 1, "--seed -1 must be at least 0"),
        (["--seed", "9" * 5000], 1, "argument --seed: invalid int value: '9999"),
        (["--train-iters", str(10**30)], 1, "must fit into 64 bits"),
        (["--train-iters", str(2**31)], 1, "--train-iters 2147483648 must be at most 2,147,483,647"),
        (["--num-layers", str(10**9)], 1, "--num-layers 1000000000 of --hidden-size 768 and MLPs of 3072 are 28,"),
        (["--distributed-timeout-minutes", str(10**9)], 1, "must be above 0 and at most 525,600"),
        (["--tensor-model-parallel-size", "0"], 1, "--tensor-model-parallel-size 0 must be at least 1 and at most"),
        (["--data-path", "1e99999999", "A", "1", "A"], 1, "the weight 1e99999999 must be a number above 0; a blend is"),
        (["--sigma-max", "1e300"], 1, "--sigma-max 1e+300 must be at most 80.0: beyond it exp(sigma) is not a float32"),
        (["--hidden-dropout", "1"], 1, "--hidden-dropout 1.0 must be at least 0 and below 1"),
        (["--min-lr", "1"], 1, "--min-lr 1.0 must not be above --lr"),
        (["--sigma-min", "30"], 1, "--sigma-min 30.0 must be above 0 and below --sigma-max"),
        (["--noise-eps", "2"], 1, "--noise-eps 2.0 must lie between 0 and 1"),
        (["--lr-decay-style", "cosine", "--train-iters", "100"], 1, "--lr-warmup-iters 2500 must be below the 100"),
        (["--config", "nowhere.yaml"], 1, "--config nowhere.yaml: no such file"),
        (["--context-parallel-size", "3"], 3, "--seq-length 1024 is not a multiple of --context-parallel-size 3"),
        (["--context-parallel-size", "2"], 3, "--context-parallel-size 2 must divide the 3 ranks started"),
        (["--sequence-parallel"], 1, "--sequence-parallel shares the sequence among tensor-parallel ranks and"),
        (
            ["--sequence-parallel", "--tensor-model-parallel-size", "4", "--seq-length", "1022"],
            4,
            "leaves 1022 tokens, not a multiple of --tensor-model-parallel-size 4 as --sequence-parallel needs",
        ),
        (["--num-layers-per-virtual-pipeline-stage", "2"], 1, "--pipeline-model-parallel-size is 1; raise that"),
        (
            ["--num-layers-per-virtual-pipeline-stage", "4", "--pipeline-model-parallel-size", "2"],
            2,
            "gives 6 layers a rank, not a multiple of --num-layers-per-virtual-pipeline-stage 4",
        ),
        (
            [
                "--num-layers-per-virtual-pipeline-stage",
                "3",
                "--pipeline-model-parallel-size",
                "2",
                "--global-batch-size",
                "24",
            ],
            2,
            "makes 3 micro-batch(es), and interleaved stages need multiples of --pipeline-model-parallel-size 2; "
            "make it a multiple of 16",
        ),
        (["--overlap-param-gather"], 1, "needs --use-distributed-optimizer and --overlap-grad-reduce; add them"),
        (
            ["--cp-comm-type", "a2a", "--context-parallel-size", "8"],
            8,
            "--cp-comm-type a2a shares 12 attention heads among --context-parallel-size 8 ranks, which does not divide",
        ),
        (["--recompute-granularity", "full"], 1, "full needs --recompute-method (uniform or block) and"),
        (["--recompute-num-layers", "1"], 1, "belong to --recompute-granularity full; add it or leave them out"),
        (["--recompute-granularity", "selective", "--recompute-modules", "moe"], 1, "invalid choice: 'moe'"),
        (["--recompute-modules", "mlp"], 1, "--recompute-modules mlp belongs to --recompute-granularity selective"),
        (["--fp8-recipe", "tensorwise"], 1, "--fp8-recipe tensorwise alone leaves FP8 off; add --fp8-format"),
        (["--ddp-bucket-size", "9"], 1, "--ddp-bucket-size 9 cuts what --overlap-grad-reduce overlaps; add that"),
        (["--fp8-format", "hybrid"], 1, "--fp8-format hybrid quantises bfloat16 activations; add --bf16"),
        (
            [*FP8, "--transformer-impl", "local"],
            1,
            "needs Transformer Engine's layers, and --transformer-impl is local",
        ),
        ([*FP8, "--device", "cpu"], 1, "--fp8-format runs on GPUs, and --device is cpu"),
        (["--bf16", "--fp8-param-gather"], 1, "--fp8-param-gather needs --fp8-format and --use-distributed-optimizer"),
        (
            [*FP8, "--recompute-granularity", "selective", "--recompute-modules", "layernorm"],
            1,
            "leave layernorm out with --fp8-format hybrid",
        ),
        ([*FP8, "--hidden-size", "792"], 1, "--hidden-size 792 is 792, not a multiple of 16 as --fp8-recipe delayed"),
        (
            [*FP8, "--tensor-model-parallel-size", "4", "--hidden-size", "96", "--ffn-hidden-size", "64"],
            4,
            "--hidden-size 96 over --tensor-model-parallel-size 4 is 24, not a multiple of 16",
        ),
        (
            [*FP8, "--fp8-recipe", "blockwise", "--ffn-hidden-size", "3000"],
            1,
            "--ffn-hidden-size 3000 is 3000, not a multiple of 128 as --fp8-recipe blockwise needs",
        ),
        (
            [*FP8, "--micro-batch-size", "1", "--seq-length", "36", "--global-batch-size", "8"],
            1,
            "--micro-batch-size 1 times --seq-length 36 over 1 rank of the sequence is 36 rows, not a multiple of 8",
        ),
        (["--verify-layout-tolerance", "0"], 1, "--verify-layout-tolerance 0.0 must be above 0"),
    ],
)
def test_mistakes_name_the_value_and_the_rule(flags, world_size, text, monkeypatch):
    with pytest.raises(UserError) as error:
        parse(*flags, world_size=world_size, monkeypatch=monkeypatch)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("num_layer: 3", "unknown option num_layer: did you mean num_layers?"),
        ("num_layers: many", "num_layers is 'many', must be of type int"),
        ("num_layers: 2.5", "num_layers is 2.5, must be of type int"),
        ("bf16: 1", "bf16 is 1, must be of type bool"),
        ("graph: line", "graph is 'line', must be one of absorb, uniform"),
        ("- a\n- b", "expected 'option: value' lines"),
        ("a: [", "not valid YAML"),
        ("seed: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_mistakes_in_yaml_are_named(content, text, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        parse("--config", str(tmp_path / "c.yaml"))
    assert text in str(error.value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_options_that_are_not_given_suit_the_device(device):
    rows, workers = {"cpu": (2048, 0), "cuda": (8192, 2)}[device]
    options = parse()
    assert options.training.loss_chunk_rows_on(device) == rows
    assert options.data.num_workers_on(device) == workers
    # A checkpoint may go on on another device: it keeps what was given.
    assert (options.to_dict()["loss_chunk_rows"], options.to_dict()["num_workers"]) == (None, None)
    for value in (0, 3):
        given = parse("--loss-chunk-rows", str(value), "--num-workers", str(value))
        assert given.training.loss_chunk_rows_on(device) == given.data.num_workers_on(device) == value


def test_help_says_what_is_taken_on_each_device(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "head and loss are computed at once, 8192 on a GPU and 2048 on a CPU if not given" in text
    assert "loader processes per rank, 2 on a GPU and 0 on a CPU if not given" in text


@pytest.mark.parametrize("version", ["2.8.0", "2.9.1+cu130", "2.10.0"])
def test_an_older_torch_is_refused_for_a_gpu(version):
    with pytest.raises(UserError) as error:
        check_torch_for_gpu(version)
    assert str(error.value) == (
        f"torch {version}: a GPU needs 2.11 or newer (sums of bf16 products in float32); pip install "
        "'torch>=2.11', or --device cpu"
    )


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.11.0a0+eb65b36914.nv26.02", "2.13.0", "3.0"])
def test_a_newer_torch_is_not(version):
    check_torch_for_gpu(version)


def test_data_path_is_required():
    with pytest.raises(UserError, match="missing --data-path: required"):
        parse_pretrain_options([])


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--data-path", "nowhere"], "error: --data-path nowhere: no file nowhere.idx"),
        (["--data-path", "nowhere", "--tokenizer-type", "ByteTokenizer"], "error: --data-path nowhere: no file"),
        (["--data-path", "x", "--bogus"], "error: unknown flag --bogus"),
        (
            ["--data-path", "x", "--transformer-impl", "transformer_engine"],
            "error: --transformer-impl runs on GPUs, and --device is cpu",
        ),
    ],
)
def test_the_example_ends_with_one_line_and_code_2_on_every_rank(flags, text, tmp_path):
    for rank in (0, 1):
        environment = child_environment(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "examples" / "pretrain_sedd.py"), *flags, "--device", "cpu"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.count("\n") == (1 if rank == 0 else 0), done.stderr
        assert rank != 0 or done.stderr.startswith(text)


@pytest.mark.parametrize(
    ("precision", "flag"),
    [
        (PrecisionOptions(transformer_impl="transformer_engine"), "--transformer-impl transformer_engine"),
        (PrecisionOptions(bf16=True, fp8_format="e4m3"), "--fp8-format e4m3"),
    ],
)
def test_transformer_engine_is_refused_where_it_cannot_run(precision, flag):
    cpu_backend.install()
    from sedd_megatron.model.layer_spec import check_transformer_engine

    with pytest.raises(UserError, match=f"{flag} needs a GPU and Transformer Engine, and there is no GPU; on a GPU"):
        check_transformer_engine(precision, torch.device("cpu"))
    check_transformer_engine(PrecisionOptions(), torch.device("cpu"))
