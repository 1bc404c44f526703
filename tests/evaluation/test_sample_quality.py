"""The quality of samples: counts done by hand, the judge's log-probabilities added one by one, the command's table."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sedd_megatron.errors import UserError
from sedd_megatron.evaluation.sample_quality import (
    Measure,
    bootstrap_ratio,
    distinct_share,
    diversity,
    load_judge,
    mauve_measure,
    mauve_of_histograms,
    mauve_score,
    perplexity_measures,
    quality_table,
    unigram_entropy,
)
from sedd_megatron.sample_quality import main, read_samples
from sedd_megatron.wording import how_to_install
from tests.commands import Done, read_records, run

CONTEXT = 16
TEXTS = ["a", "to be or not", "x" * CONTEXT, "the quick brown fox jumps over the lazy dog", "", "y" * (2 * CONTEXT - 1)]


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory) -> Path:
    """A small GPT-2 over bytes with random weights, wide enough apart that every token counts."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("judge")
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(judge_folder):
    return load_judge(str(judge_folder), "cpu", batch_size=3)


def command(*arguments: str) -> Done:
    return run([sys.executable, "-m", "sedd_megatron.sample_quality", *arguments, "--device", "cpu"])


def in_this_process(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sample_quality", *arguments])
        main()


def write_samples(path: Path, texts: list[str], **extra: list[list[int]]) -> Path:
    records = [{"text": text} | {key: values[i] for key, values in extra.items()} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def table_of(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n") if line.startswith("| ")]
    return {name: cells for name, *cells in rows[2:]}


def test_entropy_is_that_of_the_frequencies_within_a_sample():
    assert unigram_entropy([7, 7, 7]) == 0
    assert unigram_entropy(range(1024)) == pytest.approx(math.log(1024))
    # Shares 1/2, 1/4, 1/4: one and a half bits.
    assert unigram_entropy("aabc") == pytest.approx(1.5 * math.log(2))


def test_distinct_n_counts_n_grams_within_samples_only():
    samples = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct_share(samples, 1) == 3 / 7
    # 12, 21, 12 and 12, 23; nothing spans the two samples.
    assert distinct_share(samples, 2) == 3 / 5
    # 121, 212 and 123.
    assert distinct_share(samples, 3) == 1
    assert math.isnan(distinct_share([[1]], 2))


def test_diversity_of_two_samples_by_hand():
    measures = {measure.name: measure.result for measure in diversity([["a", "a", "b", "c"], ["a", "b"], []], "words")}
    assert measures["tokens per sample"].value == 3
    nats = (1.5 + 1) / 2 * math.log(2)
    assert measures["unigram entropy, nats"].value == pytest.approx(nats)
    assert measures["unigram entropy, bits"].value == pytest.approx(1.25)
    # A bootstrap over two samples finds nothing outside the two.
    assert (measures["unigram entropy, bits"].low, measures["unigram entropy, bits"].high) == pytest.approx((1, 1.5))
    assert measures["distinct-1 within a sample"].value == pytest.approx((3 / 4 + 1) / 2)
    assert measures["distinct-1 over all samples"].value == 3 / 6
    assert measures["distinct-2 over all samples"].value == 3 / 4
    assert measures["distinct-3 within a sample"].value == 1


def test_the_interval_covers_a_known_ratio_as_often_as_it_says():
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(400):
        lengths = generator.integers(1, 30, size=60)
        sums = np.array([generator.exponential(2.0, size=length).sum() for length in lengths])
        interval = bootstrap_ratio(sums, lengths, seed=trial)
        assert interval.low < interval.value < interval.high
        covered += interval.low <= 2.0 <= interval.high
    # 380 expected of 95 %, 360 of 90 %, with standard deviations of 4 and 6; the bootstrap falls a little short.
    assert 362 <= covered <= 390


def test_one_sample_has_no_interval():
    assert bootstrap_ratio([3.0], [2.0]).value == 1.5
    assert bootstrap_ratio([3.0])[1:] == (-math.inf, math.inf)
    table = quality_table([Measure("m", bootstrap_ratio([1.5]).map(math.exp), 1, "n")])
    assert table.endswith("| m | 4.5 |  | n |")


def direct_sum(judge, ids: list[int]) -> float:
    """-sum of log p(token | tokens before it in its window), token by token in float64."""
    total = 0.0
    for k in range(1, len(ids)):
        start = (k - 1) // (CONTEXT - 1) * (CONTEXT - 1)
        with torch.no_grad():
            logits = judge.model(input_ids=torch.tensor([ids[start:k]])).logits[0, -1].double()
        total -= logits.log_softmax(0)[ids[k]].item()
    return total


def test_log_likelihoods_are_the_direct_sums_windows_included(judge):
    samples = judge.encode(TEXTS)
    assert [len(ids) for ids in samples] == [len(text) for text in TEXTS]
    sums, counts = judge.negative_log_likelihoods(samples)
    assert counts.tolist() == [0, 11, 15, 42, 0, 30]
    expected = [direct_sum(judge, ids) for ids in samples]
    assert sums == pytest.approx(expected, rel=1e-5)
    # Were the context one token off, or padding seen, the sums would be other ones.
    assert abs(expected[3] / 42 - expected[1] / 11) > 0.1


def test_within_one_window_it_is_the_loss_that_the_judge_itself_computes(judge):
    ids = judge.encode([TEXTS[1]])[0]
    loss = judge.model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    sums, counts = judge.negative_log_likelihoods([ids])
    assert sums[0] / counts[0] == pytest.approx(loss, rel=1e-5)


def test_perplexity_weighs_tokens_and_the_published_training_code_samples(judge):
    sums, counts = judge.negative_log_likelihoods(judge.encode(TEXTS))
    over_tokens, over_samples = (measure.result for measure in perplexity_measures(judge, TEXTS, None))
    assert over_tokens.value == pytest.approx(math.exp(sums.sum() / counts.sum()))
    own = [math.exp(s / c) for s, c in zip(sums, counts, strict=True) if c]
    assert over_samples.value == pytest.approx(sum(own) / len(own))
    assert over_tokens.low < over_tokens.value < over_tokens.high
    first, _ = perplexity_measures(judge, TEXTS, CONTEXT)
    sums, counts = judge.negative_log_likelihoods(judge.encode([text[:CONTEXT] for text in TEXTS]))
    assert first.result.value == pytest.approx(math.exp(sums.sum() / counts.sum()))
    assert first.note.endswith("first 16 tokens, mean over tokens")


def test_features_are_the_states_at_the_last_token_in_the_order_of_the_texts(judge):
    samples = [ids for ids in judge.encode(TEXTS) if ids]
    features = judge.features(samples)
    for ids, row in zip(samples, features, strict=True):
        with torch.no_grad():
            states = judge.model.transformer(input_ids=torch.tensor([ids[:CONTEXT]])).last_hidden_state
        assert row == pytest.approx(states[0, -1].numpy(), abs=1e-4)


def test_mauve_of_equal_histograms_is_one_and_of_disjoint_ones_almost_none():
    share = np.array([0.2, 0.3, 0.5, 0.0])
    assert mauve_of_histograms(share, share) == pytest.approx(1)
    assert mauve_of_histograms(np.array([1.0, 0.0]), np.array([0.0, 1.0])) < 0.01


def test_mauve_is_the_packages_own_and_tells_sets_apart():
    mauve = pytest.importorskip("mauve", reason="mauve-text is not installed")
    generator = np.random.default_rng(0)
    own, near, far = (generator.normal(shift, 1, size=(300, 8)) for shift in (0, 0, 0.7))
    scores = [mauve_score(own, other) for other in (near, far)]
    for other, score in zip((near, far), scores, strict=True):
        found = mauve.compute_mauve(p_features=own, q_features=other)
        assert score.value == pytest.approx(found.mauve)
        assert mauve_of_histograms(found.p_hist, found.q_hist) == pytest.approx(found.mauve)
        assert 0 <= score.low < score.value < score.high <= 1
    assert scores[1].high < scores[0].low


def test_mauve_on_texts(judge):
    pytest.importorskip("mauve", reason="mauve-text is not installed")
    generator = np.random.default_rng(1)
    own, near, far = ([bytes(generator.integers(low, low + 13, size=12).tolist()).decode() for _ in range(60)]
                      for low in (97, 97, 110))  # fmt: skip
    close, distant = (mauve_measure(judge, own, other, None) for other in (near, far))
    assert close.result.value > distant.result.value + 0.2
    assert close.note.startswith("60 against 60 texts, features of ")
    with pytest.raises(
        UserError, match=r"^--reference: MAUVE compares two sets, here of 60 and 1 texts with any token;"
    ):
        mauve_measure(judge, own, ["a", ""], None)


def test_the_command_prints_perplexity_and_entropy_of_what_generate_wrote(judge, judge_folder, tmp_path, capsys):
    tokens = [[5, 5, 6], [5, 6, 7, 8]]
    samples = write_samples(tmp_path / "out.jsonl", ["to be or not", "that is the question"], tokens=tokens)
    output = tmp_path / "new" / "t.md"
    in_this_process(
        ["--samples", str(samples), "--judge", str(judge_folder), "--output", str(output), "--device", "cpu"]
    )
    printed = capsys.readouterr().out
    assert output.read_text(encoding="utf-8") == printed
    table = table_of(printed)
    expected = perplexity_measures(judge, ["to be or not", "that is the question"], 1024)[0].result
    assert table["generative perplexity"][0] == f"{expected.value:.2f}"
    assert table["generative perplexity"][1] == f"{expected.low:.2f} to {expected.high:.2f}"
    bits = (math.log2(3) - 2 / 3 + 2) / 2
    assert table["unigram entropy, bits"][0] == f"{bits:.3f}"
    assert table["unigram entropy, nats"][0] == f"{bits * math.log(2):.3f}"
    assert table["tokens per sample"] == ["3.5", "3.0 to 4.0", "the model's tokens"]
    assert "compare perplexities at equal entropy and length" in printed


def test_without_a_judge_words_count(tmp_path, capsys):
    in_this_process(["--samples", str(write_samples(tmp_path / "out.jsonl", ["a a b", "c"]))])
    table = table_of(capsys.readouterr().out)
    assert table["tokens per sample"][2] == "words"
    assert table["distinct-1 over all samples"] == ["0.750", "", "2 samples"]
    assert "generative perplexity" not in table


def test_one_command_from_model_to_table(trained, tmp_path, capsys):
    kept = tmp_path / "kept.jsonl"
    done = command("--load", str(trained), "--num-samples", "3", "--sampling-steps", "4", "--prompt", "def",
                   "--seed", "2", "--save-samples", str(kept))  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = read_records(kept)
    assert [bytes(record["tokens"][:3]) for record in records] == [b"def"] * 3
    in_this_process(["--samples", str(kept)])
    assert capsys.readouterr().out == done.stdout
    expected = np.mean([unigram_entropy(record["tokens"]) for record in records])
    assert table_of(done.stdout)["unigram entropy, nats"][0] == f"{expected:.3f}"


def test_samples_with_tokens_here_and_there_are_taken_as_texts(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"text": "a", "tokens": [1]}\n\n{"text": "b"}\n')
    assert (read_samples(path).texts, read_samples(path).tokens) == (["a", "b"], None)


def test_mistakes_end_with_one_line_and_code_2(tmp_path):
    samples = str(write_samples(tmp_path / "out.jsonl", ["a b", "c"]))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": 1}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    empty = str(write_samples(tmp_path / "blank.jsonl", ["", " "]))
    file, missing = str(tmp_path / "bad.jsonl"), str(tmp_path / "none")
    cases = [
        ([], "give either --samples, a file of samples, or --load, a model to draw them from"),
        (["--samples", samples, "--load", "m"], "give either --samples, a file of samples, or --load"),
        (["--samples", samples, "--seed", "3"], "--samples are drawn already; leave out the flags that say"),
        (["--samples", samples, "--reference", file], "--reference needs --judge: MAUVE compares the judge's features"),
        (["--samples", samples, "--judge-tokens", "1"], "--judge-tokens 1 must be at least 2, or 0 for all"),
        (["--samples", samples, "--output", str(tmp_path)], f"--output {tmp_path}: cannot be written (Is a directory)"),
        (["--samples", missing], f"--samples {missing}: cannot be read as UTF-8 text"),
        (["--samples", file], f"--samples {file}, line 2: no text; write it as"),
        (["--samples", str(tmp_path / "broken.jsonl")], "line 1: not JSON (Expecting property name"),
        (["--samples", str(tmp_path / "empty.jsonl")], "no line there; draw samples with sedd_megatron.generate"),
        (["--samples", empty], "every sample is empty; draw samples of at least one token"),
        (["--samples", samples, "--steps", "3"], "unknown flag --steps: did you mean --"),
    ]  # fmt: skip
    for arguments, message in cases:
        with pytest.raises(UserError) as raised:
            in_this_process(arguments)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    done = command(*cases[0][0])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {cases[0][1]}\n"


def test_a_judge_that_cannot_be_one_is_refused(judge_folder, tmp_path, monkeypatch):
    samples = str(write_samples(tmp_path / "out.jsonl", ["a", "b"]))
    with pytest.raises(UserError, match=r"^--judge-batch-size 0 must be at least 1$"):
        load_judge(str(judge_folder), batch_size=0)
    with pytest.raises(
        UserError, match=r"no causal language model with safetensors weights that can be loaded \(.*; name"
    ):
        load_judge(str(tmp_path))
    with pytest.raises(UserError, match=r": no sample has two of its tokens; draw longer samples$"):
        in_this_process(["--samples", samples, "--judge", str(judge_folder), "--device", "cpu"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"^--device cuda: there is no GPU; use --device cpu, or leave it out$"):
            load_judge(str(judge_folder), "cuda")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=re.escape(f"needs the package transformers; {how_to_install('quality')}, or")):
        load_judge(str(judge_folder))
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(
        UserError, match=re.escape(f"--reference: MAUVE needs the package mauve-text; {how_to_install('quality')}")
    ):
        mauve_score(np.zeros((2, 2)), np.zeros((2, 2)))


def test_weights_in_a_pickle_are_not_read(judge, judge_folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((judge_folder / name).read_bytes())
    torch.save(judge.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no causal language model with safetensors weights that can be loaded"):
        load_judge(str(tmp_path))
