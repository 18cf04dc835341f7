"""Controls of a running stream: taken and receipted when they arrive, in effect when the next chunk begins."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from fastar_backend.engine.engine import ACTION_BYTES
from fastar_backend.errors import AtCapacity, FastarError, InvalidInput
from fastar_backend.service.session import Control, Encoding, Session, json_object, read_control

if TYPE_CHECKING:
    from fastar_backend.service.service import Service

ENCODINGS = Encoding.__args__


class Controls:
    """Never lost, reordered or applied twice: ids count without a gap, and each is consumed once."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def take(self, session: Session, text: str) -> dict[str, Any]:
        """The receipt: STATS of the reply. What is wrong is told in it, and never ends the stream."""
        number = None
        try:
            control = read_control(json_object(text, "CONTROL"))
            if control is not None:
                number = control.id
                self._take(session, control)
            error = None
        except FastarError as caught:
            error = f"{caught.code}: {caught}"
        return self.service.stats(session) | {"control": {"id": number, "error": error}}

    def _take(self, session: Session, control: Control) -> None:
        if control.id < session.next_control:
            return  # a duplicate
        if control.id > session.next_control:
            raise InvalidInput("CONTROL.id", f"got {control.id}", f"{session.next_control}, the next in order")
        session.next_control += 1
        ok = False
        try:
            self._limit_rate(session)
            session.controls.append(self._check(session, control))
            ok = True
        finally:
            self.service.metrics.control(control.kind, ok)

    def _limit_rate(self, session: Session) -> None:
        rate, now = self.service.config.controls_per_second, time.monotonic()
        session.allowance = min(1.0, session.allowance + now - getattr(session, "controlled", now))
        session.controlled = now
        if session.allowance < 1 / rate:
            raise AtCapacity(f"CONTROL: more than {rate:g} a second; allowed: {rate:g}; retry in 1 s", "controls")
        session.allowance -= 1 / rate

    def _check(self, session: Session, control: Control) -> Control:
        """`control`, checked, with what takes effect at once done. Raises InvalidInput, AtCapacity."""
        service, kind, value = self.service, control.kind, control.value
        field = f"CONTROL.{kind}"
        if kind == "action":
            if not isinstance(value, str) or len(value.encode()) > ACTION_BYTES:
                raise InvalidInput(field, f"got {value!r:.40}", f"text of at most {ACTION_BYTES} bytes")
            service.engine.world.action_vector(value, field)
            for request in session.pending:
                if request.generates:
                    request.actions = (value,)
        elif kind == "fps":
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)
                                      or not 0 < value <= service.config.max_fps):  # fmt: skip
                raise InvalidInput(
                    field, f"got {value!r:.40}", f"null, or more than 0, at most {service.config.max_fps:g}"
                )
            asked = dataclasses.replace(session.booking, fps=value)
            held = [other.booking for other in service.sessions.values() if other is not session]
            # Slower than before always fits, also where the machine has become slower than what was promised.
            if value is not None and (session.fps is None or value > session.fps):
                service.admission.check(asked, held, service.retry_seconds)
            session.booking = asked
            session.playout.change(value)
        elif kind == "encoding":
            if value not in ENCODINGS:
                raise InvalidInput(field, f"got {value!r:.40}", ", ".join(ENCODINGS))
        elif kind == "pause":
            if not isinstance(value, bool):
                raise InvalidInput(field, f"got {value!r:.40}", "true or false")
            session.paused_at = time.monotonic() if value else None
            session.playout.restart()
        elif kind in ("snapshot", "rewind") and not session.snapshots_allowed:
            raise InvalidInput(field, "this stream measures recall", "streams without measure_recall")
        elif kind == "snapshot":
            if value is not True:
                raise InvalidInput(field, f"got {value!r:.40}", "true")
        elif kind == "rewind":
            if isinstance(value, bool) or not isinstance(value, int) or value not in session.stored:
                there = ", ".join(map(str, sorted(session.stored))) or "none yet"
                raise InvalidInput(field, f"got {value!r:.40}", f"a chunk with a stored snapshot: {there}")
            return dataclasses.replace(control, value=service.vault.load(session.token, value, True, lambda _: None))
        else:
            service.engine.check_control(session.stream, kind, value, control.blend_chunks)
        return control

    def apply(self, session: Session) -> None:
        """Puts what waits into effect, before a chunk of the stream begins; adds the ids to `session.applied`."""
        engine, applied = self.service.engine, session.applied
        while session.controls:
            control = session.controls[0]
            if control.kind == "rewind":
                stream = next(self.service.streams)
                engine.restore(stream, control.value.result()[1])
                engine.close(session.stream)
                session.stream = stream
                self.service.vault.forget_later(session, self.service.engine.streams[stream].chunk)
                session.playout.restart()
                self._new_encoder(session, session.encoding)
            elif control.kind == "snapshot":
                session.controls.popleft()
                applied.append(control.id)
                self.service.vault.save(session)
                continue
            elif control.kind == "encoding":
                self._new_encoder(session, control.value)
            elif control.kind in ("prompt", "density", "seed"):
                engine.control(session.stream, control.kind, control.value, control.blend_chunks)
            session.controls.popleft()
            applied.append(control.id)

    def _new_encoder(self, session: Session, encoding: str) -> None:
        if session.encoder is not None:
            self.service.outbox.after(session.encoder.close)  # after what is still to be encoded by it
        session.encoder, session.encoding = None, encoding
