"""Who is there: a small process beside each training process, that finds out when another host is missing or lost.

`jax.distributed` itself aborts a process, with a stack trace, when a host does not come in time or when the first one
dies. So the roll is called before it is set up, and while training goes on a process of its own keeps watch: it can
still say what happened when the training process cannot. It needs nothing but Python.

The watch of process 0 listens; the others connect. Lines of JSON go both ways: ``hello``, ``beat`` and ``bye`` from the
members, ``waiting``, ``complete``, ``beat``, ``failed`` and ``lost`` from process 0. With its own training process a
watch speaks over pipes: it passes on that one's signs of life, and when the pipe ends the training process is dead.
"""

import json
import os
import selectors
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

Message = dict[str, Any]


@dataclass(frozen=True)
class Roll:
    """Whom to expect, and for how long."""

    host: str
    port: int
    process_id: int
    num_processes: int
    identity: Message
    """What must be the same in all processes; a difference is refused by name."""
    patience: float
    """Seconds to wait until all are there."""
    timeout: float
    """Seconds without a sign of life after which a process is lost."""

    @property
    def interval(self) -> float:
        """Seconds between two signs of life."""
        return min(2.0, self.timeout / 5)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Line:
    """Messages over a file descriptor that is never waited for."""

    def __init__(self, read_from: int, write_to: int, owner: Any = None) -> None:
        os.set_blocking(read_from, False)
        self._read_from, self._write_to, self._owner = read_from, write_to, owner
        self._rest = b""
        self.is_open = True
        self.seen = time.monotonic()

    def fileno(self) -> int:
        return self._read_from

    def send(self, message: Message) -> None:
        try:
            os.write(self._write_to, json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_open = False

    def receive(self) -> list[Message]:
        """What has come; at the end of the connection the line is no longer open."""
        try:
            while data := os.read(self._read_from, 1 << 16):
                self._rest += data
                self.seen = time.monotonic()
            self.is_open = False
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False
        *whole, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in whole]


class Watch:
    """What both sides do, round after round: hear the training process, look who is missing, give signs of life."""

    def __init__(self, roll: Roll) -> None:
        self.roll = roll
        self.parent, self._parent_id = Line(sys.stdin.fileno(), sys.stdout.fileno()), os.getppid()
        self.began = self._beaten = time.monotonic()
        self.complete = self.leaving = self._said_goodbye = False
        self._said: set[str] = set()

    def run(self) -> NoReturn:
        """Until the training process leaves, or somebody is missing, refused or lost."""
        while True:
            self._wait()
            self._hear_parent()
            self.look()
            now = time.monotonic()
            if now - self._beaten > self.roll.interval:
                self._beaten = now
                self.beat()
            if not self.complete and now - self.began > self.roll.patience:
                advice = "start the same command there, see that both ports are open, or raise --initialization-timeout"
                self.end({"failed": f"{self.missing()} did not come within {self.roll.patience:g} s: {advice}"})

    def end(self, message: Message) -> NoReturn:
        """The last word: the training process repeats a failure, but may no longer be able to speak of a loss."""
        lost = "lost" in message and not self._said_goodbye
        if lost:
            self.say(f"{message['lost']}; this process ends too: resume from the last checkpoint when all are back")
        self.parent.send(message)
        began = time.monotonic()
        while time.monotonic() < began + (2.0 if lost and self.parent.is_open else 0.5):
            self._wait()  # reading on: a connection closed over unread messages loses the last word
            for line in (self.parent, *self.lines()):
                if isinstance(line, Line) and line.is_open:
                    line.receive()
        if lost and self.parent.is_open:
            os.kill(self._parent_id, signal.SIGKILL)  # it hangs in a collective, and holds Python's lock
        raise SystemExit(0)

    def say(self, text: str) -> None:
        """On the console, once."""
        if text not in self._said:
            self._said.add(text)
            print(f"isgd: process {self.roll.process_id}: {text}", file=sys.stderr, flush=True)

    def go(self) -> None:
        """All are there."""
        self.complete = True
        self.parent.send({"complete": True})

    def is_silent(self, line: Line) -> bool:
        return time.monotonic() - line.seen > self.roll.timeout

    @property
    def silence(self) -> str:
        return f"gave no sign of life for {self.roll.timeout:g} s (--heartbeat-timeout)"

    def lines(self) -> list[Any]:
        """What to listen to, beside the training process."""
        raise NotImplementedError

    def look(self) -> None:
        """Hear the others."""
        raise NotImplementedError

    def beat(self) -> None:
        """Give a sign of life, and look for those that give none."""
        raise NotImplementedError

    def leave(self, error: str | None) -> None:
        """The training process is done; with an error, the others cannot go on."""
        raise NotImplementedError

    def missing(self) -> str:
        """Who has not come."""
        raise NotImplementedError

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            for line in (self.parent, *self.lines()):
                if getattr(line, "is_open", True):
                    selector.register(line, selectors.EVENT_READ)
            selector.select(timeout=min(0.2, self.roll.interval))

    def _hear_parent(self) -> None:
        errors = [message["bye"] for message in self.parent.receive() if "bye" in message]
        self._said_goodbye |= bool(errors)
        if not self.parent.is_open and not errors:
            errors = ["its training process died"]
        if errors and not self.leaving:
            self.leaving = True
            self.leave(errors[0])


class First(Watch):
    """The watch of process 0: it listens, and tells all when one is lost."""

    def __init__(self, roll: Roll) -> None:
        super().__init__(roll)
        try:
            self._door = socket.create_server(("", roll.port))
        except OSError as error:
            self.end({"failed": f"cannot listen on port {roll.port} ({error.strerror}): choose another --coordinator"})
        self._door.setblocking(False)
        self._strangers: list[Line] = []
        self._members: dict[int, Line] = {}
        self._gone: set[int] = set()

    def lines(self) -> list[Any]:
        return [self._door, *self._strangers, *self._members.values()]

    def look(self) -> None:
        self._open_door()
        for line in list(self._strangers):
            for message in line.receive():
                self._admit(message, line)
            if not line.is_open and line in self._strangers:
                self._strangers.remove(line)
        for number, line in list(self._members.items()):
            for message in line.receive():
                if "bye" in message:
                    self._goodbye(number, message["bye"])
            if number in self._members and not line.is_open:
                self._lose(number, "ended without a word")
        if not self.complete and not self._absent():
            self._tell({"complete": True})
            self.go()
        if self.leaving and not self._members:
            self.end({"left": True})

    def beat(self) -> None:
        self._tell({"beat": True} if self.complete else {"waiting": self.missing()})
        if not self.complete and time.monotonic() - self.began > 3:
            self.say(f"waiting for {self.missing()}, at most {self.roll.patience:g} s (--initialization-timeout)")
        if self.complete and not self.leaving and self.is_silent(self.parent):
            self._lose(0, self.silence)
        for number, line in list(self._members.items()):
            if self.complete and self.is_silent(line):
                self._lose(number, self.silence)

    def leave(self, error: str | None) -> None:
        if error is not None:
            self._lose(0, f"ended: {error}")

    def missing(self) -> str:
        absent = self._absent()
        of = f"of {self.roll.num_processes}"
        return f"process{'es' if len(absent) > 1 else ''} {', '.join(map(str, absent))} {of}"

    def _absent(self) -> list[int]:
        return [i for i in range(1, self.roll.num_processes) if i not in self._members and i not in self._gone]

    def _open_door(self) -> None:
        try:
            while True:
                guest, _ = self._door.accept()
                line = Line(guest.fileno(), guest.fileno(), owner=guest)
                self._strangers.append(line)
        except BlockingIOError:
            pass

    def _admit(self, hello: Message, line: Line) -> None:
        self._strangers.remove(line)
        wrong = self._what_is_wrong(hello["hello"], hello["identity"])
        if wrong is None:
            self._members[hello["hello"]] = line
        else:
            line.send({"failed": wrong, "refused": True})
            self.say(f"refused a process: {wrong}")

    def _what_is_wrong(self, number: int, identity: Message) -> str | None:
        total, ours = self.roll.num_processes, self.roll.identity
        if not 0 <= number < total:
            return f"--process-id must be between 0 and {total - 1}, as --num-processes is {total}; got {number}"
        if number == 0 or number in self._members:
            return f"there is a process {number} already: give each host its own --process-id"
        for name in sorted(ours.keys() | identity.keys()):
            if ours.get(name) != identity.get(name):
                differs = f"{name}: expected {ours.get(name)!r}, got {identity.get(name)!r}"
                return f"process {number} differs from process 0 in {differs}; start the same command on every host"
        return None

    def _goodbye(self, number: int, error: str | None) -> None:
        if error is not None:
            self._lose(number, f"ended: {error}")
        self._gone.add(number)
        del self._members[number]

    def _lose(self, number: int, why: str) -> NoReturn:
        """Tell all; what follows from the first loss is no news."""
        message = {"lost": f"process {number} of {self.roll.num_processes} {why}"}
        self._tell(message)
        self.end(message)

    def _tell(self, message: Message) -> None:
        for line in self._members.values():
            line.send(message)


class Other(Watch):
    """The watch of every process but 0: it connects, and hears of losses. Silence means that process 0 is lost."""

    def __init__(self, roll: Roll) -> None:
        super().__init__(roll)
        self._first: Line | None = None
        self._absent = f"process 0 at {roll.host}:{roll.port}"

    def lines(self) -> list[Any]:
        return [] if self._first is None else [self._first]

    def look(self) -> None:
        if self._first is None:
            return self._connect()
        for message in self._first.receive():
            self._absent = message.get("waiting", self._absent)
            if "complete" in message:
                self.go()
            if "lost" in message or "failed" in message:
                self.end(message)
        if not self._first.is_open:
            self._lose_first("ended without a word")

    def beat(self) -> None:
        if not self.complete and time.monotonic() - self.began > 3:
            self.say(f"waiting for {self._absent}, at most {self.roll.patience:g} s (--initialization-timeout)")
        if self._first is not None and time.monotonic() - self.parent.seen < 2 * self.roll.interval:
            self._first.send({"beat": True})
        if self._first is not None and self.is_silent(self._first):
            self._lose_first(self.silence)

    def leave(self, error: str | None) -> None:
        if self._first is not None:
            self._first.send({"bye": error})
        if error is None or self._first is None:
            self.end({"left": True})

    def missing(self) -> str:
        return self._absent

    def _lose_first(self, why: str) -> NoReturn:
        self.end({"lost": f"process 0 of {self.roll.num_processes} {why}"})

    def _connect(self) -> None:
        try:
            guest = socket.create_connection((self.roll.host, self.roll.port), timeout=1.0)
        except OSError:
            return
        self._first = Line(guest.fileno(), guest.fileno(), owner=guest)
        self._absent = "the others"
        self._first.send({"hello": self.roll.process_id, "identity": self.roll.identity})


def watch(roll: Roll) -> NoReturn:
    """Watch over a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    (First if roll.process_id == 0 else Other)(roll).run()


if __name__ == "__main__":
    watch(Roll(**json.loads(sys.argv[1])))
