"""A tuned model as EleutherAI's lm-evaluation-harness sees one. Imports the harness: import this in functions only.

Texts become tokens as in the harness's own Hugging Face model, so that numbers are comparable; what the model does with
the tokens is this package's batched log-likelihoods and writing.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fedloom.data.templates import layout_for, pieces_of
from fedloom.errors import UserError
from fedloom.evaluate.generate import Opening, Sampling, decode
from fedloom.evaluate.loglikelihood import Continuation
from fedloom.evaluate.tasks.run import ModelAnswerer, until
from fedloom.seeds import seed_of

__all__ = ["HarnessModel", "RecordedModel", "Said"]

POSITIONS = 2048  # the harness's own, for a model that says no number
NEW_TOKENS = 256  # the harness's own, for a task that says no number

Place = tuple[str, int]  # task, number of the document in it


class Said(NamedTuple):
    """A question of the harness and its answer."""

    kind: str  # loglikelihood, loglikelihood_rolling or generate_until
    arguments: tuple[Any, ...]
    answer: Any


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """See the top of the file. `said` keeps what was asked and answered, `cut` counts items cut on the left to fit."""

    def __init__(self, answerer: ModelAnswerer, *, max_new_tokens: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.answerer, self.tokenizer = answerer, answerer.tokenizer
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.max_length = answerer.positions or POSITIONS
        self.said: dict[Place, list[Said]] = defaultdict(list)
        self.cut: set[Place] = set()
        self._instances: Sequence[Instance] = ()

    # ---- tokens ------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template has put the first token there already
            add_special_tokens = not string.startswith(str(self.tokenizer.decode(self.prefix_token_id)))
        return list(self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The layout of training: the tokenizer's own template, or the Alpaca layout."""
        if layout_for(self.tokenizer, self.answerer.chat_template) == "tokenizer":
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        *turns, last = pieces_of({"kind": "chat", "messages": chat_history})  # the last one is to be gone on from
        return "".join(one.text + (self.tokenizer.eos_token if one.ends else "") for one in turns) + last.text

    # ---- what the harness asks ---------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._instances = requests
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return self._noted(requests, found)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = [
            self._fitted(instance, before, tokens)
            for instance, (_, before, tokens) in zip(self._instances, requests, strict=True)
        ]
        return [(one.nats, one.greedy) for one in self.answerer.loglikelihoods(asked)]

    def _fitted(self, instance: Instance, before: list[int], tokens: list[int]) -> Continuation:
        """What the model has positions for: the start of the context is cut off, as in the harness."""
        if not tokens:
            raise UserError(
                f"lm_eval:{instance.task_name}, item {instance.doc_id}: the answer {instance.args[-1]!r} has no token",
                code="evaluate.no_tokens",
            )
        if len(tokens) > self.max_length:
            raise UserError(
                f"lm_eval:{instance.task_name}, item {instance.doc_id}: an answer of {len(tokens):,} tokens, and the "
                f"model has {self.max_length:,} positions",
                "a model with more positions, or another task",
                "task.too_long",
            )
        kept = self.max_length + 1 - len(tokens)  # the last token is only asked about
        if len(before) > kept:
            self.cut.add(_place(instance))
        return Continuation(before[-kept:], tokens)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        asked: list[Continuation] = []
        owner: list[int] = []
        for number, instance in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(instance.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for before, tokens in map(make_disjoint_window, windows):
                asked.append(Continuation(before, tokens))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, one in zip(owner, self.answerer.loglikelihoods(asked), strict=True):
            sums[number] += one.nats
        return self._noted(requests, sums)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        repeats: Counter[tuple[Place, int]] = Counter()
        asked = []
        for instance in requests:
            repeats[_place(instance), instance.idx] += 1
            asked.append(self._opening(instance, repeats[_place(instance), instance.idx]))
        texts = decode(self.tokenizer, self.answerer.written(asked))
        return self._noted(requests, [until(text, one.stop) for text, one in zip(texts, asked, strict=True)])

    def _opening(self, instance: Instance, repeat: int) -> Opening:
        context, said = instance.args
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(said, NEW_TOKENS))
        stop = tuple(text for text in kwargs.pop("until") if text)
        room = self.max_new_tokens or kwargs.pop("max_gen_toks")
        if room >= self.max_length:
            raise UserError(
                f"lm_eval:{instance.task_name} has answers of up to {room:,} tokens, and the model has "
                f"{self.max_length:,} positions for question and answer",
                f"--max-new-tokens {max(1, self.max_length // 4)}",
                "task.too_long",
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        if len(ids) > self.max_length - room:
            self.cut.add(_place(instance))
        seed = seed_of(self.seed, 0, f"{instance.task_name}/{instance.doc_id}", f"harness/{instance.idx}/{repeat}")
        return Opening(ids[room - self.max_length :], room, stop, _sampling(str(instance.task_name), kwargs, seed))

    def _noted(self, requests: Sequence[Instance], answers: list[Any]) -> list[Any]:
        for instance, answer in zip(requests, answers, strict=True):
            self.said[_place(instance)].append(Said(instance.request_type, instance.args, answer))
        return answers


def _place(instance: Instance) -> Place:
    return str(instance.task_name), int(instance.doc_id or 0)


def _sampling(task: str, kwargs: Mapping[str, Any], seed: int) -> Sampling | None:
    """How a task's `generation_kwargs` draw.

    Raises:
        UserError: they name something that is not done here.
    """
    known = {"do_sample", "temperature", "top_p", "top_k", "max_gen_toks"}
    unknown = [f"{name}: {value}" for name, value in kwargs.items() if name not in known]
    unknown = [one for one in unknown if one != "num_beams: 1"]
    if unknown:
        raise UserError(
            f"lm_eval:{task}: its generation_kwargs have {', '.join(unknown)}, which is not done here",
            "do_sample, temperature, top_p, top_k, until and max_gen_toks are",
            "task.generation",
        )
    if not kwargs["do_sample"]:
        return None
    return Sampling(
        float(kwargs.get("temperature") or 1.0), float(kwargs.get("top_p", 1.0)), int(kwargs.get("top_k", 0)), seed
    )


class RecordedModel(LM):  # type: ignore[misc]
    """Gives the answers that another model gave, for judging them again.

    Args:
        said: of each item, in the order in which it was asked.
        templated: the other model saw the questions in its chat template, which is not known here.

    Raises:
        UserError: it is asked something that the other model was not asked.
    """

    def __init__(self, said: Mapping[Place, Sequence[Said]], templated: bool) -> None:
        super().__init__()
        self.said = {place: list(own) for place, own in said.items()}
        self.templated = templated

    def _again(self, requests: Sequence[Instance]) -> list[Any]:
        found = []
        for instance in requests:
            own = self.said.get(_place(instance), [])
            one = next((one for one in own if one.kind == instance.request_type), None)
            if one is None or self._seen(one.arguments) != self._seen(instance.args):
                raise UserError(
                    f"lm_eval:{instance.task_name}: item {instance.doc_id} is not as it was asked",
                    "the task or its data have changed since: measure again",
                    "task.file",
                )
            own.remove(one)
            found.append(one.answer)
        return found

    def _seen(self, arguments: Sequence[Any]) -> str:
        return json.dumps(list(arguments[self.templated :]), sort_keys=True)

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        return [tuple(answer) for answer in self._again(requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[Any]:
        return self._again(requests)

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        return self._again(requests)
