"""What a load test does: a frozen description, from a preset's name or a JSON file, that `plan` turns into streams."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastar_client.errors import invalid
from fastar_client.protocol import StreamOptions, World, check_action, check_encoding, check_fps, check_prompt

MAX_STREAMS = 100_000
PROMPTS = ("a dark corridor", "a wide hall of stone", "a room full of light", "a path through a cave")


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the test with its own arrivals: Poisson at a rate, and a wave at the phase's beginning."""

    seconds: float
    per_minute: float = 0.0  # streams that arrive, on average, at random times
    burst: int = 0  # further streams, that arrive evenly spread over
    burst_seconds: float = 0.0  # (0: all at the phase's beginning)


@dataclasses.dataclass(frozen=True)
class Slo:
    """What viewers are owed when streams are paced, on the client's clock. None: not asked for."""

    p5_fps_share: float | None = 0.99  # p5 of the streams' FPS over the scenario's fps, which no paced stream exceeds
    continuous_play: float | None = 0.99  # mean share of chunks that are there when the viewer needs them (prebuffer 1)
    rebuffer: float | None = 0.005  # stalled / (stalled + played), over all streams
    ttfc_p95_seconds: float | None = 1.5  # from when a stream was due to arrive to its first chunk
    control_p95_periods: float | None = 1.5  # from a control to the first chunk that obeys, in chunk periods
    slow_down: float | None = 0.02  # last decile of chunk times over the first, less 1, p95 of streams
    lost: int | None = 0  # streams that were rejected, evicted, or failed


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Raises InvalidArgument on construction, naming field, value and allowed."""

    phases: tuple[Phase, ...]
    session_seconds: tuple[float, float]  # how long a stream is watched: uniform between these two
    fps: float = 16.0  # the rate that a viewer needs
    paced: bool = True  # False: chunks are asked for as fast as they come (saturating)
    disconnect_share: float = (
        0.0  # of streams whose TCP connection breaks without a word, somewhere in their second half
    )
    slow_share: float = 0.0  # of streams whose reader takes chunks at 1/slow_factor of the frame rate
    slow_factor: float = 2.0
    action_seconds: tuple[float, float] | None = (
        2.0,
        5.0,
    )  # pause between two actions of a viewer: uniform; None: none
    prompt_seconds: tuple[float, float] | None = (10.0, 20.0)  # likewise between prompts
    actions: tuple[str, ...] = ()  # to choose from; none: the buttons of the server's world
    prompts: tuple[str, ...] = ()  # likewise; none: the scenarios of the server's world
    encoding: str = "raw"
    attention: Mapping[str, Any] | None = None  # None: the server's
    slo: Slo = Slo()

    def __post_init__(self) -> None:
        if not self.phases:
            raise invalid("phases", self.phases, "at least one")
        for number, phase in enumerate(self.phases):
            name = f"phases.{number}"
            number_in(f"{name}.seconds", phase.seconds, 0.1, 1e6)
            number_in(f"{name}.per_minute", phase.per_minute, 0, 1e6)
            number_in(f"{name}.burst", phase.burst, 0, MAX_STREAMS)
            number_in(f"{name}.burst_seconds", phase.burst_seconds, 0, phase.seconds)
        if (expected := self.expected_streams) > MAX_STREAMS:
            raise invalid("phases", f"about {expected:.0f} streams", f"at most {MAX_STREAMS}")
        interval("session_seconds", self.session_seconds, 0.1)
        number_in("fps", check_fps(self.fps), 0.01, 1000)
        for name in ("disconnect_share", "slow_share"):
            number_in(name, getattr(self, name), 0, 1)
        if self.disconnect_share + self.slow_share > 1:
            raise invalid(
                "slow_share", self.slow_share, f"at most {1 - self.disconnect_share:g}, with disconnect_share"
            )
        number_in("slow_factor", self.slow_factor, 1, 1000)
        for name in ("action_seconds", "prompt_seconds"):
            if getattr(self, name) is not None:
                interval(name, getattr(self, name), 0.05)
        for action in self.actions:
            check_action(action)
        for prompt in self.prompts:
            check_prompt(prompt)
        check_encoding(self.encoding)
        StreamOptions("a hall", attention=self.attention)
        for field in dataclasses.fields(Slo):
            if (limit := getattr(self.slo, field.name)) is not None:
                number_in(f"slo.{field.name}", limit, 0, 1e6)

    @property
    def seconds(self) -> float:
        """In which streams arrive."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def expected_streams(self) -> float:
        return sum(phase.per_minute * phase.seconds / 60 + phase.burst for phase in self.phases)

    def in_world(self, world: World) -> Scenario:
        """With the server's buttons and scenarios, where the scenario names none of its own."""
        known = tuple(world.scenarios.values())
        actions = self.actions or (*world.buttons, "")
        return dataclasses.replace(self, actions=actions, prompts=self.prompts or known or PROMPTS)

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def preset(name: str, streams: int = 4, seconds: float = 60.0, fps: float = 16.0, paced: bool = True) -> Scenario:
    """A named scenario. streams: how many are open at once (on average, but for `hold`); seconds: how long streams
    arrive. Raises InvalidArgument."""
    number_in("streams", streams, 1, MAX_STREAMS)
    number_in("seconds", seconds, 1, 1e6)
    common: dict[str, Any] = {"fps": fps, "paced": paced}
    if name == "hold":  # exactly so many, all the time: for the capacity of a server
        phase = Phase(seconds, burst=streams, burst_seconds=min(streams - 1.0, seconds / 4))
        return Scenario((phase,), (seconds, seconds), **common)
    if name == "steady":  # arrivals at one rate; full after the longest session
        session = (seconds / 8, 3 * seconds / 8)
        return Scenario((Phase(seconds, per_minute=60 * streams / (seconds / 4)),), session, **common)
    if name in ("wave", "chaos"):  # half as many, all, a burst of as many again, recovery
        quarter, session = seconds / 4, (seconds / 16, 3 * seconds / 16)
        full = 60 * streams / (seconds / 8)
        phases = (
            Phase(quarter, full / 2),
            Phase(quarter, full),
            Phase(quarter, full, burst=streams),
            Phase(quarter, full / 2),
        )
        faults = {"disconnect_share": 0.1, "slow_share": 0.05} if name == "chaos" else {}
        return Scenario(phases, session, **faults, **common)
    raise invalid("scenario", name, f"{', '.join(PRESETS)}, or a JSON file")


PRESETS = ("hold", "steady", "wave", "chaos")


def read_scenario(path: Path) -> Scenario:
    """Raises InvalidArgument for what cannot be read, is unknown, missing, or out of range."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise invalid("scenario", str(path), f"{', '.join(PRESETS)}, or a readable JSON file ({reason})") from None
    return build(Scenario, values, "")


def build(kind: type[Any], values: object, at: str) -> Any:
    """`kind` (a dataclass) from JSON. at: the name of the field that `values` is, with a dot; empty at the top."""
    where = at.rstrip(".") or "scenario"
    if not isinstance(values, dict):
        raise invalid(where, values, "a JSON object")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    types_of = typing.get_type_hints(kind)
    for name in values:
        if name not in fields:
            raise invalid(f"{at}{name}", values[name], f"only {', '.join(fields)} in {where}")
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise invalid(f"{at}{name}", None, "a value: it is required")
    return kind(**{name: convert(types_of[name], value, f"{at}{name}") for name, value in values.items()})


def convert(kind: Any, value: object, name: str) -> Any:
    """`value`, from JSON, as a field of type `kind`."""
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, f"{name}.")
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        length = None if parts[-1] is Ellipsis else len(parts)
        if not isinstance(value, list) or length not in (None, len(value)):
            raise invalid(name, value, "a JSON list" if length is None else f"a JSON list of {length}")
        return tuple(convert(parts[0], part, f"{name}.{number}") for number, part in enumerate(value))
    plain = typing.get_origin(kind) or kind
    accepted = {float: (int, float), int: int, bool: bool, str: str}.get(plain, dict)
    if not isinstance(value, accepted) or (isinstance(value, bool) and plain is not bool):
        words = {float: "a number", int: "an integer", bool: "true or false", str: "text"}
        raise invalid(name, value, words.get(plain, "a JSON object"))
    return value


def number_in(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise invalid(name, value, f"a number {least:g}..{most:g}")


def interval(name: str, value: tuple[float, float], least: float) -> None:
    if not least <= value[0] <= value[1] <= 1e6:
        raise invalid(name, list(value), f"two numbers {least:g}..1e6, the second not less than the first")
