"""What the player does: actions held, or played one per latent frame."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from pathlib import Path

from fastar_client.errors import invalid
from fastar_client.protocol import check_action

# A string is held; a (possibly async, possibly endless) iterable gives one action per latent frame, and its last is
# held; None is no button at all.
Actions = str | Iterable[str] | AsyncIterable[str] | None

MAX_REPEAT = 1_000_000


class Script:
    """A source of actions, taken one chunk at a time. Raises InvalidArgument for what is no action."""

    def __init__(self, source: Actions) -> None:
        self.held = ""
        self._next: Iterator[str] | None = None
        self._anext: AsyncIterator[str] | None = None
        if source is None or isinstance(source, str):
            self.held = check_action(source or "")
        elif isinstance(source, AsyncIterable):
            self._anext = aiter(source)
        elif isinstance(source, Iterable) and not isinstance(source, bytes | bytearray):
            # A sequence can be checked before anything is sent; a generator only as it goes.
            self._next = iter([check_action(a) for a in source] if isinstance(source, list | tuple) else source)
        else:
            raise invalid("actions", source, "a string, an iterable of strings, or None")

    @property
    def varies(self) -> bool:
        """False once one action is held for good."""
        return self._next is not None or self._anext is not None

    async def take(self, latent_frames: int) -> tuple[str, ...]:
        """One action for each of the next `latent_frames`, or a single one where it is held for all of them."""
        taken: list[str] = []
        while self.varies and len(taken) < latent_frames:
            try:
                action = await anext(self._anext) if self._anext is not None else next(self._next or iter(()))
            except (StopIteration, StopAsyncIteration):
                self._next = self._anext = None
            else:
                self.held = check_action(action)
                taken.append(action)
        if not taken:
            return (self.held,)
        return tuple(taken + [self.held] * (latent_frames - len(taken)))


def parse_script(text: str, loop: bool) -> str | Iterator[str]:
    """The actions of "forward*8,turn_left*4": comma-separated, `*N` repeats, an empty item is no button.

    "@path" reads the script from a file, where new lines separate like commas. Raises InvalidArgument.
    """
    if text.startswith("@"):
        try:
            text = ",".join(Path(text[1:]).read_text(encoding="utf-8").split("\n")).rstrip(",")
        except (OSError, ValueError) as error:
            raise invalid("actions", text, f"@ and a readable UTF-8 file ({error})") from None
    runs: list[tuple[str, int]] = []
    for item in text.split(","):
        action, star, count = (part.strip() for part in item.partition("*"))
        if star and not (re.fullmatch(r"[0-9]{1,7}", count) and 1 <= int(count) <= MAX_REPEAT):
            raise invalid("actions", item.strip(), f"action*N with N 1..{MAX_REPEAT}")
        runs.append((check_action(action), int(count) if star else 1))
    if loop and len({action for action, _ in runs}) == 1:
        return runs[0][0]
    played = itertools.cycle(runs) if loop else runs
    return itertools.chain.from_iterable(itertools.repeat(action, count) for action, count in played)
