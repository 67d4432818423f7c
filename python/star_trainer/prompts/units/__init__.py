"""Which phrases of a prompt matter: text units by rule, by a chat model, or as they stand beside the prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from star_trainer.config import Units
from star_trainer.prompts import Prompt
from star_trainer.prompts.units import chat, rules
from star_trainer.prompts.units.cache import UnitCache, cache_key


@dataclasses.dataclass(frozen=True)
class Extraction:
    """The units of a prompt and where they come from: file, rules, llm, or the rules where the llm's are of no use."""

    units: tuple[str, ...]
    source: str


class UnitExtractor:
    """Fills in the units of prompts as the section ``units`` says; what a chat model said once comes from the cache.

    Attributes:
        replaced: prompts so far whose units come from the rules because the chat model gave no usable ones.
    """

    def __init__(self, config: Units) -> None:
        self.config = config
        self.replaced = 0
        self._usable = False

    @property
    def name(self) -> str:
        """The extractor and its version: what the cache is keyed by beside the prompt."""
        return f"{self.config.source} {chat.VERSION} {self.config.task} {self.config.model}"

    def __call__(self, prompts: Sequence[Prompt], progress: Callable[[int], object] | None = None) -> list[Extraction]:
        """The units of each prompt. `progress` is called with the number of prompts that were finished.

        Raises:
            ChatError: the chat model cannot be loaded or reached, or has given no usable units for any prompt so far.
            CacheError: the cache cannot be used.
        """
        if self.config.source == "file":
            return [Extraction(prompt.units, "file") for prompt in prompts]
        keys = [cache_key(self.name, prompt.text, prompt.metadata) for prompt in prompts]
        known = {} if self._cache is None else self._cache.get(keys)
        found = {key: Extraction(tuple(units), self.config.source) for key, units in known.items()}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        if progress is not None:
            progress(len(prompts) - len(missing))
        items = list(missing.items())
        for first in range(0, len(items), self.config.batch_size):
            some = items[first : first + self.config.batch_size]
            extracted = self._extract([prompt for _, prompt in some])
            fresh = dict(zip([key for key, _ in some], extracted, strict=True))
            found |= fresh
            if self._cache is not None:
                # Not those that the rules stand in for: another time the model may do better.
                kept = {key: entry for key, entry in fresh.items() if entry.source == self.config.source}
                self._cache.put({key: (missing[key].text, entry.units) for key, entry in kept.items()})
            if progress is not None:
                progress(len(some))
        extractions = [found[key] for key in keys]
        self._usable |= any(extraction.source == self.config.source for extraction in extractions)
        if extractions and not self._usable:
            raise chat.ChatError(
                f"units.model: {self.config.model} has given usable units for none of {len(missing)} prompts; choose "
                "another one, more room for its answers (units.max_new_tokens), or units=rules"
            )
        return extractions

    def fill(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with their units."""
        return [
            dataclasses.replace(prompt, units=extraction.units)
            for prompt, extraction in zip(prompts, self(prompts), strict=True)
        ]

    @cached_property
    def _cache(self) -> UnitCache | None:
        # The rules take less time than looking them up.
        if self.config.source != "llm" or self.config.cache is None:
            return None
        return UnitCache(Path(self.config.cache).expanduser())

    @cached_property
    def _chat(self) -> chat.Chat:
        config = self.config
        assert config.model is not None, "checked by Config"
        if config.endpoint is None:
            return chat.TransformersChat(config.model, max_new_tokens=config.max_new_tokens)
        return chat.EndpointChat(
            config.endpoint,
            config.model,
            key_variable=config.key_variable,
            timeout=config.timeout,
            max_new_tokens=config.max_new_tokens,
            token_limit=config.token_limit,
            temperature=config.temperature,
        )

    def _extract(self, prompts: list[Prompt]) -> list[Extraction]:
        answers: list[list[str] | None] = [None] * len(prompts)
        by_chat = self.config.source == "llm"
        if by_chat:
            answers = chat.ask(
                self._chat, [prompt.text for prompt in prompts], self.config.task, retries=self.config.retries
            )
            self.replaced += answers.count(None)
        return [
            Extraction(
                tuple(rules.units_by_rule(prompt.text, prompt.metadata)), "rules for llm" if by_chat else "rules"
            )
            if answer is None
            else Extraction(tuple(answer), "llm")
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
