"""Text that grows token by token: what of it is certain, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from jaxmodels.data.tokenizer import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
BEFORE = 6
"""Tokens of the prompt that are decoded with the first new ones: a token's text may depend on those before it."""
LONGEST = 8
"""So many tokens without a whole character are broken bytes, of which the last alone are waited for."""
INCOMPLETE = 3
"""The most tokens of a character that is not yet whole: it has up to four bytes."""


class Words:
    """The text behind a prompt, of which `add` gives what is certain after each token, and `rest` the end."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids = [int(token) for token in prompt[-BEFORE:]]
        self._from, self._to = 0, len(self._ids)
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; the text ends before it."""

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self._ids.append(token)
        known = self._tokenizer.decode(self._ids[self._from : self._to])
        text, end = self._tokenizer.decode(self._ids[self._from :]), len(self._ids)
        if text.endswith(UNKNOWN):  # it may be the first bytes of a character
            if end - self._to < LONGEST:
                return ""
            text, end = self._cut(text)
        self._from, self._to = self._to, end
        return self._pass(text[len(known) :])

    def _cut(self, text: str) -> tuple[str, int]:
        """The text without its last tokens, which may begin a character, and where those begin."""
        for end in range(len(self._ids) - INCOMPLETE, len(self._ids)):
            first, rest = self._ids[self._from : end], self._ids[end:]
            before = self._tokenizer.decode(first)
            if before + self._tokenizer.decode(rest) == text:  # no character lies on both sides
                return before, end
        return text, len(self._ids)

    def rest(self) -> str:
        """Return what was held back, at the end of the text."""
        known = self._tokenizer.decode(self._ids[self._from : self._to])
        text = self._pass(self._tokenizer.decode(self._ids[self._from :])[len(known) :])
        text, self._held = text + ("" if self.stopped else self._held), ""
        return text

    def _pass(self, new: str) -> str:
        """Return what can no longer become part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + new
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text with which a stop string may begin."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
