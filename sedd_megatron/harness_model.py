"""A model as lm-evaluation-harness asks it: likelihoods of continuations and of texts, and texts up to a stop.

    log p(continuation | context) >= -bound

Under the absorbing graph the context is given, and the bound is one on the conditional likelihood. The uniform graph
has none; there the answer is bound(context) - bound(context and continuation), an estimate without a sign.

Draws depend on the seed, the task and its document's number alone: answers to one question are compared under the same
noise, and neither the order of requests nor the batch nor the layout changes an answer by more than rounding.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import simple_parse_args_string

from sedd_megatron.config import LayoutOptions, ParallelOptions, PrecisionOptions
from sedd_megatron.data.batches import batches_of
from sedd_megatron.diffusion.score_reader import ScoresNotFiniteError
from sedd_megatron.errors import UserError, one_line, scores_not_finite
from sedd_megatron.evaluation.bounds import bound_on_replicas, tensors_of, unit_bounds
from sedd_megatron.evaluation.windows import MAX_DRAWS, Window, cut, strided
from sedd_megatron.generation.greedy import greedy_gives
from sedd_megatron.generation.requests import MAX_KEY, MAX_LENGTH, Frame
from sedd_megatron.generation.settings import SamplingOptions, settings_of
from sedd_megatron.layout_rules import check_layout
from sedd_megatron.options import check_rules, check_values, in_short, instances_of, option, required_options
from sedd_megatron.parallel.groups import (
    errors_of_all_replicas,
    gathered_from_replicas,
    groups_of_this_process,
)

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from sedd_megatron.diffusion.likelihood import BoundEstimator
    from sedd_megatron.pretrained import PretrainedModel
    from sedd_megatron.saved_model import SavedModel


@dataclass(frozen=True)
class LoadOptions:
    """The model"""

    load: str = option(MISSING, "folder that training saved to, one iter_* folder in it, or a published model")
    bf16: bool = option(False, "compute in bfloat16; the sums stay float32 and float64")


@dataclass(frozen=True)
class HarnessOptions:
    """How it is asked"""

    mc_samples: int = option(128, "random draws per likelihood, and window of a longer text")
    greedy: bool = option(True, "answer whether greedy decoding gives a continuation: a network call for each token")
    max_gen_toks: int = option(256, "tokens of a generated text, where the task does not say")
    seed: int = option(0, "seed of all draws")


# What the harness says where nobody has named a device, GPU or not.
HARNESS_DEVICE = "cuda:0"
# Under the harness's own, so that its settings hold.
LOGGER = logging.getLogger("lm_eval.sedd_megatron")
Answer = TypeVar("Answer")
MODEL_ARGUMENTS = (LoadOptions, HarnessOptions, SamplingOptions, LayoutOptions)


class Question(NamedTuple):
    """Whose likelihood is asked for: the tokens from number num_given on."""

    draws: str  # what decides its draws
    tokens: tuple[int, ...]
    num_given: int


@register_model("sedd")
class HarnessModel(LM):
    """For `simple_evaluate(model=HarnessModel(load_pretrained(DIR)), ...)`, or by the name sedd."""

    def __init__(
        self,
        model: "PretrainedModel",
        options: HarnessOptions | None = None,
        sampling: SamplingOptions | None = None,
        time_eps: float = 1e-3,
    ) -> None:
        """`time_eps` is where the bound's diffusion term ends, as in training."""
        super().__init__()
        self.model, self.time_eps = model, time_eps
        self.options, self.sampling = options or HarnessOptions(), sampling or SamplingOptions()
        self.absorbing = model.graph.mask_token_id is not None
        check_numbers(self.options)
        settings_of(self.sampling, model.graph, str)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """From --model_args and what the harness adds to them; loads the model.

        Raises:
            UserError: an unknown argument, a wrong value, no model.
        """
        load, options, sampling, layout, saved = check_arguments(arg_dict, additional_config or {})
        parallel = ParallelOptions(**vars(layout))
        model = saved.load(parallel, PrecisionOptions(bf16=load.bf16), lambda: groups_of_this_process(parallel))
        return cls(model, options, sampling, saved.diffusion.time_eps)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "HarnessModel":
        """As create_from_arg_obj, from name=value,name=value."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log-likelihood in nats, and whether greedy decoding gives it.

        Under the uniform graph, which has no greedy order, and without `greedy` the second is False.

        Raises:
            UserError: a continuation without tokens, by its task and document.
        """
        questions = []
        for request in requests:
            with errors_of(request):
                context, continuation = self._encode_pair(*request.args)
                if not continuation:
                    raise UserError(
                        f"its answer {request.args[1]!r} has no token, so that nothing is asked; mend the task, or "
                        "leave the document out"
                    )
            questions.append(Question(draws_of(request), (*context, *continuation), len(context)))
        if self.absorbing:
            nats = [-bound for bound in self._bounds(questions)]
        else:
            length = self.model.seq_length
            # As much of the context as fits into a window with the continuation, or into as many as that needs.
            questions = [_last(question, max(length, len(question.tokens) - question.num_given))
                         for question in questions]  # fmt: skip
            contexts = [Question(draws, tokens[:given], 0) for draws, tokens, given in questions]
            joint = self._bounds([question._replace(num_given=0) for question in questions])
            nats = [one - both for one, both in zip(self._bounds(contexts), joint, strict=True)]
        answers = list(zip(nats, self._greedy(questions), strict=True))
        return self._remember("loglikelihood", requests, answers)

    def loglikelihood_rolling(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Of each (text,): its log-likelihood in nats, in windows where it is longer than the trained length.

        Windows have the half before given under the absorbing graph, and stand alone under the uniform one.
        """
        questions = []
        for request in requests:
            with errors_of(request):
                tokens = self.model.tokenizer.encode(request.args[0])
            questions.append(Question(draws_of(request), tuple(tokens), 0))
        answers = [-bound for bound in self._bounds(questions)]
        return self._remember("loglikelihood_rolling", requests, answers)

    def generate_until(self, requests: "Sequence[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Of each (context, settings): what follows, up to the first of the settings' `until`.

        The settings are the harness's until, max_gen_toks, do_sample and temperature, and any option of sampling.
        Without do_sample the most probable token is taken wherever one is drawn; which positions come first is drawn
        in any case. The whole length is made before it is cut.
        """
        asked: dict[SamplingOptions, list[Frame]] = {}
        stops, seen = [], Counter()
        for number, request in enumerate(requests):
            context, arguments = request.args
            try:
                plan = normalize_gen_kwargs(arguments, self.options.max_gen_toks)
            except (ValueError, TypeError, OverflowError) as error:
                raise UserError(f"generation_kwargs: {one_line(error)}; mend the task, or give --gen_kwargs") from error
            check_numbers(replace(self.options, max_gen_toks=plan["max_gen_toks"]))
            with errors_of(request):
                tokens = self.model.tokenizer.encode(context)
                if not all(isinstance(stop, str) for stop in plan["until"]):
                    raise UserError(f"until is {in_short(arguments['until'])}, must be a text or texts; mend the task")
            # The harness asks a question that is to be answered several times so often, without telling them apart.
            key = draws_of(request)
            seen[key] += 1
            frame = self._frame(number, tokens, plan["max_gen_toks"], f"{key}/{seen[key]}")
            asked.setdefault(self._sampling(plan), []).append(frame)
            stops.append(plan["until"])
        texts: dict[int, str] = {}
        for sampling, frames in asked.items():
            texts |= self._generated(sampling, frames)
        answers = [postprocess_generated_text(texts[number], until, None) for number, until in enumerate(stops)]
        return self._remember("generate_until", requests, answers)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, by the harness's convention: blanks between them belong to the continuation, and tokens are
        those of the whole.

        Where the whole does not begin with the context's tokens, as when one of its tokens spans both, the continuation
        has the tokens of its own text: all answers to a question meet the same context.
        """
        tokenizer, stem = self.model.tokenizer, context.rstrip()
        continuation = context[len(stem) :] + continuation
        if not stem:
            return [], tokenizer.encode(continuation)
        given, whole = tokenizer.encode(stem), tokenizer.encode(stem + continuation)
        if whole[: len(given)] == given:
            return given, whole[len(given) :]
        return given, tokenizer.encode_inside(continuation)

    @cached_property
    def _estimator(self) -> "BoundEstimator":
        return self.model.bound_estimator(
            seed=self.options.seed,
            num_draws=self.options.mc_samples,
            time_eps=self.time_eps,
            batch_size=self.sampling.batch_size,
            # For the few tokens of an answer its error is the smaller by far.
            integrate_over="mask-count" if self.absorbing else "time",
        )

    def _bounds(self, questions: Sequence[Question]) -> list[float]:
        """The bound of each in nats, 0 for no tokens; equal ones are computed once."""
        distinct = {question: unit for unit, question in enumerate(dict.fromkeys(questions))}
        windows: list[Window] = []
        for question, unit in distinct.items():
            pieces = (
                strided(question.tokens, self.model.seq_length, question.num_given)
                if self.absorbing
                else cut(question.tokens, self.model.seq_length)
            )
            for part, (tokens, num_given) in enumerate(pieces):
                key = key_of(f"{question.draws}/{part}")
                windows.append(Window(len(windows), unit, tuple(tokens), num_given, key))
        if not windows:
            return [0.0] * len(questions)
        found = unit_bounds(windows, bound_on_replicas(self._estimator, windows, self.model.groups))
        errors = torch.tensor([unit.standard_error for unit in found])
        LOGGER.info("Monte Carlo standard error in nats: median %.3f, largest %.3f", errors.median(), errors.max())
        by_unit = {unit.unit: unit.bound for unit in found}
        return [by_unit.get(distinct[question], 0.0) for question in questions]

    def _greedy(self, questions: Sequence[Question]) -> list[bool]:
        if not (self.absorbing and self.options.greedy):
            return [False] * len(questions)
        model, groups = self.model, self.model.groups
        ends = [_last(question, model.seq_length) for question in questions]
        windows = [Window(number, number, end.tokens, end.num_given) for number, end in enumerate(ends)]
        found = {}
        with errors_of_all_replicas(groups):
            for batch in batches_of(windows[groups.data_rank :: groups.data_size], self.sampling.batch_size):
                try:
                    gives = greedy_gives(model.score_fn, model.graph, model.schedule, *tensors_of(batch, model.device))
                except ScoresNotFiniteError as error:
                    raise scores_not_finite(f"question {batch[error.sequence].number}", error.sigma) from error
                found |= {window.number: one for window, one in zip(batch, gives.tolist(), strict=True)}
        found = gathered_from_replicas(found, groups)
        return [found[number] for number in range(len(questions))]

    def _frame(self, number: int, context: Sequence[int], num_free: int, draws: str) -> Frame:
        """Request `number`: as much of the context's end as leaves room, at least half a window of it."""
        length = self.model.seq_length
        tokens = context[-max(length - num_free, length // 2, 1) :]
        given = [True] * len(tokens) + [False] * num_free
        return Frame(key_of(draws), self.options.seed, (*tokens, *[0] * num_free), tuple(given), number)

    def _sampling(self, plan: dict[str, Any]) -> SamplingOptions:
        """The model's sampling options with a request's own."""
        temperature = plan.get("temperature", self.sampling.temperature) if plan["do_sample"] else 0.0
        own = {name: value for name, value in plan.items() if name not in ("until", "max_gen_toks", "do_sample")}
        checked = check_values(own | {"temperature": temperature}, (SamplingOptions,), where="generation_kwargs")
        return replace(self.sampling, **checked)

    def _generated(self, sampling: SamplingOptions, frames: Sequence[Frame]) -> dict[int, str]:
        """What was made after each frame's context, by request number; replicas share the batches."""
        model, groups = self.model, self.model.groups
        settings = settings_of(sampling, model.graph, str)
        batches = list(batches_of(frames, sampling.batch_size))
        texts = {}
        with errors_of_all_replicas(groups):
            made = [text for batch in batches[groups.data_rank :: groups.data_size]
                    for text in model.engine.make(batch, settings, sampling.stop_at_eod)]  # fmt: skip
        for text in made:
            context = model.tokenizer.decode(text.tokens[: sum(text.given)])
            # Decoded by itself, a text would lose the space that a tokenizer has in its first token.
            texts[text.line] = text.text[len(context) :]
        return gathered_from_replicas(texts, groups)

    def _remember(self, kind: str, requests: "Sequence[Instance]", answers: list[Answer]) -> list[Answer]:
        """For the harness's --use_cache."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


@contextmanager
def errors_of(request: "Instance") -> Iterator[None]:
    """Mistakes in a request's texts by its task and document, among them text that is not Unicode."""
    where = f"task {request.task_name}, document {request.doc_id}"
    try:
        for text in request.args:
            if isinstance(text, str):
                text.encode("utf-8")
        yield
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {error.object[error.start]!r} is half a surrogate pair and no character; mend the task, or "
            "leave the document out"
        ) from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def draws_of(request: "Instance") -> str:
    """What decides a request's draws: all requests of a document share them."""
    return f"{request.task_name}/{request.doc_id}"


def key_of(draws: str) -> int:
    """The number that stands for it among the keys of draws: 63 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(draws.encode("utf-8"), digest_size=8).digest(), "big") >> 1


def check_arguments(
    arg_dict: dict[str, Any], added: dict[str, Any]
) -> "tuple[LoadOptions, HarnessOptions, SamplingOptions, LayoutOptions, SavedModel]":
    """What --model_args and the harness's own flags, `added`, ask for, and the model; no weight is read.

    Raises:
        UserError: the first mistake.
    """
    from sedd_megatron.saved_model import find_saved_model

    added = {name: value for name, value in added.items() if value is not None}
    if added.get("device") == HARNESS_DEVICE:
        del added["device"]
    elif "device" in added:
        added["device"] = added["device"].split(":")[0]  # each rank takes its own
    values = check_values(added | arg_dict, MODEL_ARGUMENTS, where="--model_args")
    missing = [name for name in required_options(MODEL_ARGUMENTS) if name not in values]
    if missing:
        raise UserError(f"--model_args: missing {', '.join(missing)}; write --model_args load=FOLDER")
    load, options, sampling, layout = instances_of(values, MODEL_ARGUMENTS)
    check_layout(layout, str)
    check_numbers(options)
    saved = find_saved_model(load.load, layout.device)
    settings_of(sampling, saved.graph, str)
    return load, options, sampling, layout, saved


def check_numbers(options: HarnessOptions) -> None:
    """Numbers in their ranges.

    Raises:
        UserError: one is not.
    """
    rules = (
        ("mc_samples", options.mc_samples >= 2 and options.mc_samples % 2 == 0, "must be even and at least 2"),
        ("mc_samples", options.mc_samples <= MAX_DRAWS, f"must be at most {MAX_DRAWS}"),
        ("max_gen_toks", 1 <= options.max_gen_toks <= MAX_LENGTH, f"must be from 1 to {MAX_LENGTH}"),
        ("seed", 0 <= options.seed <= MAX_KEY, f"must be from 0 to {MAX_KEY}"),
    )
    check_rules(options, rules, str)


def _last(question: Question, length: int) -> Question:
    """Its last `length` tokens."""
    left_out = max(len(question.tokens) - length, 0)
    return Question(question.draws, question.tokens[left_out:], max(question.num_given - left_out, 0))
