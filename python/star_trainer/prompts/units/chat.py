"""Text units from a chat model: transformers' or any that an OpenAI-compatible endpoint serves."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from star_kernels.text_units import stands_in
from star_trainer.config import TrainerError
from star_trainer.config.paths import folder_or_name
from star_trainer.families.devices import own_device
from star_trainer.families.loading import load_whole

VERSION = 1

Message = dict[str, Any]
Chat = Callable[[list[Message]], str]

_COMMON = """\
You receive a JSON array of prompts for a text-to-image model. For each prompt, list the phrases of it whose rendering
decides whether the image is right.

Copy each phrase from its prompt letter by letter: same words, same order, same spelling, nothing added, nothing joined
that does not stand together. Choose phrases of one to eight words, the most important first, at most eight per prompt
and at least one. Leave out articles at their start. Leave out phrases that only say that this is a photo or a picture.
"""
_TASKS = {
    "geneval": """\
What counts here are objects: list every object together with its number and its colour if the prompt gives them
("two clocks", "red umbrella"), and every spatial relation together with both of its objects ("dog right of a bench").
""",
    "ocr": """\
What counts here is rendered text. List, in this order:
1. the exact text that is to appear in the image, as the prompt spells and capitalises it, without quotation marks;
   each such text is a phrase of its own;
2. the surface or object that carries it ("neon sign", "coffee mug");
3. the visible style of the lettering, if given ("bold red letters");
4. the main objects of the scene with their key visible attributes.
""",
    "general": """\
List, as far as the prompt has them:
1. the exact text that is to appear in the image, without quotation marks, each such text as a phrase of its own;
2. the main objects with their key visible attributes: number, colour, material, size;
3. actions and relations that make up a visible region of the image ("riding a bicycle", "on top of a car");
4. a concrete background ("snowy mountains");
5. viewpoint or style, only where it changes what is seen ("from above", "watercolour").
Leave out moods and qualities that nobody could point at.
""",
}
_FORM = """\
Answer with one JSON array and nothing else: no explanation, no code fence. It holds one array of strings per prompt, in
the order of the prompts. For ["a red cup on a table", "two dogs"] an answer is [["red cup", "table"], ["two dogs"]].
"""
TASKS = tuple(_TASKS)


class ChatError(TrainerError, RuntimeError):
    """A chat model that cannot be reached or does not answer as one; the message names it."""


class MalformedAnswer(ValueError):
    """An answer that is not the array that was asked for; the message says what is wrong with it."""


def instruction(task: str) -> str:
    """What the chat model is told to do, for one of `TASKS`."""
    return f"{_COMMON}\n{_TASKS[task]}\n{_FORM}"


# What models that think aloud end their thoughts with; their templates may have opened them in the question.
_THOUGHT = re.compile(
    r"\A.*(?:</(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>)",
    re.DOTALL | re.IGNORECASE,
)


def without_thought(answer: str) -> str:
    """An answer without what a model says to itself before it."""
    return _THOUGHT.sub("", answer).strip()


def parse(answer: str, count: int) -> list[list[str]]:
    """The units of `count` prompts from an answer that has to be one JSON array of arrays of strings.

    Raises:
        MalformedAnswer: it is anything else.
    """
    try:
        value = json.loads(answer)
    except (json.JSONDecodeError, RecursionError) as error:
        raise MalformedAnswer(f"it is not JSON: {error}") from error
    if not isinstance(value, list):
        raise MalformedAnswer(f"it is a {type(value).__name__} and not an array")
    if len(value) != count:
        raise MalformedAnswer(f"it has {len(value)} entries for {count} prompts")
    for index, units in enumerate(value):
        if not isinstance(units, list) or not all(isinstance(unit, str) for unit in units):
            raise MalformedAnswer(f"entry {index} is not an array of strings")
    return value


def ask(chat: Chat, prompts: Sequence[str], task: str, *, retries: int) -> list[list[str] | None]:
    """Each prompt's units by the chat model, or None for a prompt that it gives no usable ones for.

    Units are usable when there is at least one and all of them stand in the prompt. Otherwise the model is told what is
    wrong and asked again, up to `retries` times; what was usable in an earlier answer is kept.
    """
    found: list[list[str] | None] = [None] * len(prompts)
    question = json.dumps(list(prompts), ensure_ascii=False)
    opening = [{"role": "system", "content": instruction(task)}, {"role": "user", "content": question}]
    messages = opening
    for _ in range(retries + 1):
        answer = without_thought(chat(messages))
        try:
            complaints = _accept(parse(answer, len(prompts)), prompts, found)
        except MalformedAnswer as error:
            complaints = [f"This is not the array that was asked for: {error}."]
        if all(units is not None for units in found):
            break
        # Only the last answer: a conversation of all attempts would outgrow the context of a small model.
        complaint = " ".join(complaints[:8]) + " Answer again, for all prompts."
        messages = [*opening, {"role": "assistant", "content": answer}, {"role": "user", "content": complaint}]
    return found


def _accept(answer: list[list[str]], prompts: Sequence[str], found: list[list[str] | None]) -> list[str]:
    """Put the usable units into `found`, and say what is wrong with the others."""
    complaints = []
    for index, (prompt, units) in enumerate(zip(prompts, answer, strict=True)):
        foreign = [unit for unit in units if not stands_in(prompt, unit)]
        if foreign:
            complaints.append(f"These do not stand in prompt {index + 1} letter by letter: {json.dumps(foreign[:4])}.")
        elif not units:
            complaints.append(f"Prompt {index + 1} has no phrase.")
        elif found[index] is None:
            found[index] = list(dict.fromkeys(units))
    return complaints


class TransformersChat:
    """A chat model that transformers loads, from a folder or a model hub.

    Raises:
        ChatError: it cannot be loaded whole, or has no chat template.
    """

    def __init__(self, model: str, *, max_new_tokens: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            source = folder_or_name(model, "units.model")
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            self.model = load_whole(AutoModelForCausalLM, source, dtype="auto").to(own_device())
        except (OSError, ValueError) as error:
            raise ChatError(f"units.model: {model} cannot be loaded: {error}") from error
        if self.tokenizer.chat_template is None:
            raise ChatError(f"units.model: {model} has no chat template; choose an instruction-tuned model")
        self.max_new_tokens = max_new_tokens

    def __call__(self, messages: list[Message]) -> str:
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class EndpointChat:
    """A chat model behind an OpenAI-compatible endpoint: POST ``{endpoint}/chat/completions``.

    Args:
        endpoint: base address, such as ``http://localhost:8000/v1``.
        model: the name that the endpoint knows the model by.
        key_variable: environment variable that holds the API key; without it, none is sent.
        timeout: seconds until a request is given up.
        max_new_tokens: the longest answer.
        token_limit: the parameter for that, or ``auto``: max_tokens, and max_completion_tokens once that is asked for.
        temperature: is sent unless it is None.
        attempts: how often a request is made before the endpoint counts as dead, with growing pauses between.
        setting: the section of the configuration that is named when something is wrong.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        key_variable: str,
        timeout: float,
        max_new_tokens: int,
        token_limit: str = "auto",
        temperature: float | None = 0.0,
        attempts: int = 4,
        setting: str = "units",
    ) -> None:
        self.setting = setting
        self.url = f"{endpoint.rstrip('/')}/chat/completions"
        self.model, self.max_new_tokens, self.timeout, self.attempts = model, max_new_tokens, timeout, attempts
        self.token_limit = "max_tokens" if token_limit == "auto" else token_limit
        self.adapts = token_limit == "auto"
        self.sampling = {} if temperature is None else {"temperature": temperature}
        key = os.environ.get(key_variable)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def __call__(self, messages: list[Message]) -> str:
        failure = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(2.0**attempt, 30.0) / 2)
            status, answer = self._ask(messages)
            if status == 400 and self.adapts and self.token_limit == "max_tokens" and "max_completion_tokens" in answer:
                self.token_limit = "max_completion_tokens"
                status, answer = self._ask(messages)
            if status == 200:
                return self._content(answer)
            failure = f"status {status}: {answer[:200]}" if status else answer
            if status and status != 429 and status < 500:
                break
        advice = f"; {self.setting}.temperature=null sends none" if status == 400 and "temperature" in answer else ""
        raise ChatError(f"{self.setting}.endpoint: {self.url} did not answer ({failure}){advice}")

    def _ask(self, messages: list[Message]) -> tuple[int, str]:
        body = {"model": self.model, "messages": messages, self.token_limit: self.max_new_tokens}
        return self._post({**body, **self.sampling})

    def _post(self, body: dict[str, Any]) -> tuple[int, str]:
        """Status and text of one request; status 0 and the reason where none came back."""
        import requests

        try:
            reply = requests.post(self.url, json=body, headers=self.headers, timeout=self.timeout)
        except requests.RequestException as error:
            return 0, str(error)
        return reply.status_code, reply.text

    def _content(self, answer: str) -> str:
        try:
            content = json.loads(answer)["choices"][0]["message"]["content"]
        except (json.JSONDecodeError, LookupError, TypeError) as error:
            raise ChatError(
                f"{self.setting}.endpoint: {self.url} answers no chat completion: {answer[:200]}"
            ) from error
        if isinstance(content, list):
            # In parts, of which some are thoughts.
            texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            content = "".join(text for text in texts if isinstance(text, str))
        if not isinstance(content, str):
            raise ChatError(f"{self.setting}.endpoint: {self.url} answers no text: {answer[:200]}")
        return content
