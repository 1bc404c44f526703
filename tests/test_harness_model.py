"""lm-evaluation-harness gets the likelihoods and texts of a law that is written down, whatever the order it asks in."""

import dataclasses
import itertools
import math
from functools import cached_property
from types import SimpleNamespace

import pytest
import tokenizers as hf
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import simple_parse_args_string

from sedd_megatron.data.library_tokenizers import HuggingFaceTokenizer
from sedd_megatron.data.tokenizers import CharTokenizer
from sedd_megatron.diffusion.score_reader import score_fn_of
from sedd_megatron.errors import UserError
from sedd_megatron.generation.settings import SamplingOptions
from sedd_megatron.harness_model import HARNESS_DEVICE, HarnessModel, HarnessOptions, check_arguments
from sedd_megatron.pretrained import PretrainedModel
from tests.diffusion.laws import chi_squared_p_value
from tests.diffusion.toy import GRAPHS, LAW, LENGTH, SCHEDULES, conditional_law, exact_log_score_fn
from tests.training.test_convert import published_folder

TEXTS = ["".join(letters) for letters in itertools.product("abc", repeat=LENGTH)]


class ExactModel(PretrainedModel):
    """With the toy's own scores in place of a network."""

    @cached_property
    def score_fn(self):
        return score_fn_of(exact_log_score_fn(self.graph), self.graph.num_tokens)


def harness_model(name: str = "absorb", time_eps: float = 0.02, batch_size: int = 4096, **options) -> HarnessModel:
    groups = SimpleNamespace(device=torch.device("cpu"), data_rank=0, data_size=1)
    model = ExactModel(None, GRAPHS[name], SCHEDULES[name], CharTokenizer("abc"), LENGTH, groups)
    sampling = SamplingOptions(sampling_steps=64, batch_size=batch_size)
    return HarnessModel(model, HarnessOptions(**{"mc_samples": 512} | options), sampling, time_eps)


def requests(kind: str, *arguments: tuple, task: str = "task") -> list[Instance]:
    return [Instance(kind, {}, one, 0, (task, number, 1)) for number, one in enumerate(arguments)]


def probability(text: str, context: str = "") -> float:
    """Of the text after the context, under the law's first positions."""
    law = conditional_law({i: "abc".index(letter) for i, letter in enumerate(context)})
    for letter in context + text:
        law = law["abc".index(letter)]
    return law.sum().item()


# Draws of the uniform graph are by time, and their weights differ more.
DRAWS = {"absorb": 256, "uniform": 1024}
RMS_ERROR = {"absorb": 0.1, "uniform": 0.35}


def rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("num_given", range(LENGTH))
def test_likelihoods_of_continuations(name, num_given):
    """A bound with exact scores is the likelihood; under the uniform graph it is the difference of two that are."""
    asked = [(text[:num_given], text[num_given:]) for text in TEXTS]
    answers = harness_model(name, mc_samples=DRAWS[name]).loglikelihood(requests("loglikelihood", *asked))
    expected = torch.tensor([probability(text[num_given:], text[:num_given]) for text in TEXTS]).log()
    found = torch.tensor([nats for nats, _ in answers])
    assert rms(found - expected) < RMS_ERROR[name]
    assert rms(found - expected.flip(0)) > 0.6


def test_a_single_token_is_answered_with_few_draws():
    """It has no other variance than that of draws beyond the integral's ends."""
    asked = requests("loglikelihood", *((text[:2], text[2:]) for text in TEXTS))
    found = torch.tensor([nats for nats, _ in harness_model(mc_samples=8, time_eps=1e-3).loglikelihood(asked)])
    expected = torch.tensor([probability(text[2:], text[:2]) for text in TEXTS]).log()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)


def test_greedy_decoding():
    """The most probable pair of position and token is filled in first."""

    def greedy(known: dict[int, int]) -> dict[int, int]:
        if len(known) == LENGTH:
            return known
        law = conditional_law(known)
        marginals = {(i, token): law.movedim(i, 0)[token].sum().item()
                     for i in range(LENGTH) if i not in known for token in range(3)}  # fmt: skip
        position, token = max(marginals, key=marginals.get)
        return greedy(known | {position: token})

    for num_given in range(LENGTH):
        asked = [(text[:num_given], text[num_given:]) for text in TEXTS]
        answers = harness_model(mc_samples=2).loglikelihood(requests("loglikelihood", *asked))
        for text, (_, is_greedy) in zip(TEXTS, answers, strict=True):
            found = greedy({i: "abc".index(letter) for i, letter in enumerate(text[:num_given])})
            assert is_greedy == (text == "".join("abc"[found[i]] for i in range(LENGTH))), text
        assert sum(is_greedy for _, is_greedy in answers) == 3**num_given
    assert not any(one for _, one in harness_model(mc_samples=2, greedy=False).loglikelihood(requests("", *asked)))


@pytest.mark.parametrize("name", GRAPHS)
def test_likelihoods_of_texts(name):
    model = harness_model(name, mc_samples=DRAWS[name])
    found = torch.tensor(model.loglikelihood_rolling(requests("", *((text,) for text in TEXTS))))
    expected = torch.tensor([probability(text) for text in TEXTS]).log()
    assert rms(found - expected) < RMS_ERROR[name]
    # A longer text is cut into windows: the second has the last token of the first given, or is by itself.
    (longer,) = model.loglikelihood_rolling(requests("", ("abcab",)))
    second = probability("ab", "c") if name == "absorb" else probability("ab")
    assert longer == pytest.approx(math.log(probability("abc") * second), abs=0.5)
    assert model.loglikelihood_rolling(requests("", ("",))) == [0.0]


@pytest.mark.parametrize("name", GRAPHS)
def test_neither_order_nor_batch_changes_an_answer(name):
    asked = requests("", *((text[:1], text[1:]) for text in TEXTS))
    whole = harness_model(name, mc_samples=8).loglikelihood(asked)
    back = harness_model(name, mc_samples=8, batch_size=5).loglikelihood(asked[::-1])[::-1]
    for (nats, is_greedy), (other, is_other) in zip(whole, back, strict=True):
        assert nats == pytest.approx(other, rel=1e-12)
        assert is_greedy == is_other
    seeded = harness_model(name, mc_samples=8, seed=1).loglikelihood(asked)
    assert any(abs(nats - other) > 1e-3 for (nats, _), (other, _) in zip(whole, seeded, strict=True))


def test_answers_to_one_question_share_their_draws():
    """The same continuation asked for twice by one document has one answer, and by two documents two."""
    one, other = requests("", ("", "ab"), ("", "ab"))
    model = harness_model(mc_samples=4)
    shared = model.loglikelihood([one, dataclasses.replace(one, idx=1)])
    assert shared[0] == shared[1]
    assert model.loglikelihood([other])[0][0] != shared[0][0]


@pytest.mark.parametrize("name", GRAPHS)
def test_of_a_long_context_the_end_counts(name):
    model = harness_model(name, mc_samples=16)
    answers = model.loglikelihood(requests("", ("ccccbcab", "c")) + requests("", ("ab", "c")))
    assert answers[0] == answers[1]


def test_spaces_between_context_and_continuation_belong_to_the_continuation():
    model = harness_model()
    model = HarnessModel(dataclasses.replace(model.model, tokenizer=CharTokenizer("ab ")), model.options)
    assert model._encode_pair("ab ", "b") == ([0, 1], [2, 1])
    assert model._encode_pair(" ", "b") == ([], [2, 1])


def spanning_model(**options) -> HarnessModel:
    """The toy's three tokens are Ans, wer and Answer, which spans a context Ans and its answer wer."""
    words = hf.Tokenizer(hf.models.WordLevel({"Ans": 0, "wer": 1, "Answer": 2}))
    words.pre_tokenizer = hf.pre_tokenizers.Split(hf.Regex("Answer|Ans|wer"), "isolated")
    tokenizer = HuggingFaceTokenizer(words, None)
    assert tokenizer.encode("AnswerAns") == [2, 0]
    model = harness_model(**options)
    return HarnessModel(dataclasses.replace(model.model, tokenizer=tokenizer), model.options, None, model.time_eps)


def test_an_answer_keeps_its_tokens_where_one_token_spans_it_and_its_context():
    model = spanning_model(mc_samples=8, time_eps=1e-3)
    answers = model.loglikelihood(requests("", *((2 * "wer" + "Ans", answer) for answer in ("wer", "Ans", "Answer"))))
    # The last three tokens count: of wer, Ans and each answer.
    expected = conditional_law({0: 1, 1: 0})[1, 0]
    found = torch.tensor([nats for nats, _ in answers]).exp()
    torch.testing.assert_close(found, expected[[1, 0, 2]].float(), rtol=0.01, atol=0)
    assert [is_greedy for _, is_greedy in answers] == [bool(expected[token] == expected.max()) for token in (1, 0, 2)]


def test_an_answer_without_tokens_is_an_error_that_names_its_document():
    (_, one) = requests("", ("abc", "a"), ("a", ""), task="quiz")
    with pytest.raises(
        UserError, match=r"^task quiz, document 1: its answer '' has no token, so that nothing is asked"
    ):
        harness_model().loglikelihood([one])


def test_texts_that_no_tokenizer_takes_are_errors_that_name_their_document():
    model, settings = harness_model(mc_samples=2), {"max_gen_toks": 1, "until": []}
    half = r"^task quiz, document 1: '\\udcff' is half a surrogate pair and no character; mend the task, or leave the"
    unknown = r"^task quiz, document 1: character 'z' is not among the 3 that this CharTokenizer knows; "
    for text, message in (("a\udcff", half), ("z", unknown)):
        for answer, good, bad in (
            (model.loglikelihood, ("a", "b"), (text, "b")),
            (model.loglikelihood, ("a", "b"), ("a", text)),
            (model.loglikelihood_rolling, ("a",), (text,)),
            (model.generate_until, ("a", settings), (text, settings)),
        ):
            with pytest.raises(UserError, match=message):
                answer(requests("", good, bad, task="quiz"))
    for until, shown in ((None, "None"), (["a", 1], r"\['a', 1\]")):
        asked = requests("", ("a", settings), ("a", settings | {"until": until}), task="quiz")
        with pytest.raises(
            UserError, match=rf"^task quiz, document 1: until is {shown}, must be a text or texts; mend"
        ):
            model.generate_until(asked)


def test_texts_follow_the_law_given_the_context():
    settings = {"do_sample": True, "max_gen_toks": 2, "until": []}
    drawn = harness_model().generate_until(requests("", *[("b", settings)] * 3000))
    counts = torch.tensor([drawn.count(a + b) for a, b in itertools.product("abc", repeat=2)])
    assert counts.sum() == 3000
    assert chi_squared_p_value(counts, conditional_law({0: 1})[1].flatten()) > 1e-3
    assert chi_squared_p_value(counts, conditional_law({0: 0})[0].flatten()) < 1e-6


@pytest.mark.parametrize("name", GRAPHS)
def test_texts_end_before_the_first_stop(name):
    settings = {"do_sample": True, "max_gen_toks": 2}
    whole, stopped = (
        harness_model(name).generate_until(requests("", *[("b", settings | {"until": until})] * 60))
        for until in ([], ["c", "ab"])
    )
    assert {len(text) for text in whole} == {2}
    assert stopped == [text.split("c")[0].split("ab")[0] for text in whole]


def test_without_sampling_the_most_probable_tokens_are_taken():
    settings = {"max_gen_toks": 1, "until": ["x"]}
    texts = harness_model().generate_until(requests("", *(("ccc" + text[:2], settings) for text in TEXTS[::3])))
    assert texts == ["abc"[int(LAW[a, b].argmax())] for a, b in itertools.product(range(3), repeat=2)]


def test_a_question_that_is_asked_several_times_gets_several_answers():
    (one,) = requests("", ("", {"do_sample": True, "max_gen_toks": 3, "temperature": 1.0, "until": []}))
    texts = harness_model().generate_until([one] * 20)
    assert len(set(texts)) > 5
    assert harness_model(batch_size=3).generate_until([one] * 20) == texts


def test_options_of_sampling_come_with_the_request():
    settings = {"max_gen_toks": 3, "until": [], "do_sample": True}
    model = harness_model()
    plain, sharp, other = model.generate_until(
        requests(
            "",
            ("", settings),
            ("", settings | {"temperature": 0.0}),
            ("", settings | {"sampler": "event-driven", "sampling_steps": 4}),
        )
    )
    assert {len(text) for text in (plain, sharp, other)} == {3}
    for own, text in (
        ({"max_gen_toks": 10**12}, r"^max_gen_toks 1000000000000 must be from 1 to 1048576$"),
        ({"temperature": "hot"}, r"^generation_kwargs: could not convert string to float: 'hot'; mend the task, or"),
    ):
        with pytest.raises(UserError, match=text):
            model.generate_until(requests("", ("", settings | own)))
    with pytest.raises(UserError, match=r"^generation_kwargs: unknown option num_beams: "):
        model.generate_until(requests("", ("", settings | {"num_beams": 4})))
    with pytest.raises(UserError, match=r"^top_p 2\.0 must be above 0 and at most 1"):
        model.generate_until(requests("", ("", settings | {"top_p": 2})))


def test_the_harness_names_a_gpu_where_nobody_has_named_a_device(tmp_path):
    """Its default is cuda:0, here on a machine that may have none; what a person names is taken as it is."""
    folder = published_folder(tmp_path / "model", "absorb")

    def device_of(arguments: str, named: str | None) -> str:
        *_, layout, _ = check_arguments(simple_parse_args_string(arguments), {"device": named, "batch_size": 1})
        return layout.device

    assert device_of(f"load={folder}", HARNESS_DEVICE) == "auto"
    assert device_of(f"load={folder}", None) == "auto"
    assert device_of(f"load={folder},device=cpu", HARNESS_DEVICE) == "cpu"
    assert device_of(f"load={folder}", "cpu") == "cpu"
    assert EvaluatorConfig().device == HARNESS_DEVICE
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"--device cuda: 1 rank on this node and 0 GPUs"):
            device_of(f"load={folder}", "cuda:1")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("mc_samples=4", "--model_args: missing load; write --model_args load=FOLDER"),
        ("load=x,mc_sample=4", "--model_args: unknown option mc_sample: did you mean mc_samples? --help lists every "
         "flag"),
        ("load=x,mc_samples=3", "mc_samples 3 must be even and at least 2"),
        ("load=x,tensor_model_parallel_size=0", "tensor_model_parallel_size 0 must be at least 1 and at most "
         "2,147,483,647"),
        ("load=", "--model_args: load is '', must not be empty: leave it out, or give what it names"),
        ("load=x,batch_size=auto", "--model_args: batch_size is 'auto', must be of type int"),
        ("load=x,sampler=heun", "--model_args: sampler is 'heun', must be one of euler, analytic, ancestral, "
         "event-driven, predictor-corrector"),
    ],
)  # fmt: skip
def test_mistakes_in_the_arguments(arguments, text):
    with pytest.raises(UserError) as error:
        get_model("sedd").create_from_arg_string(arguments, {"device": "cpu", "batch_size": None})
    assert str(error.value) == text
