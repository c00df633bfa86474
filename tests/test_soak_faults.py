"""Three hundred random faults over all engines: `make soak`.

Trial K draws engine and fault from the number K alone: one is repeated by itself, and many can be run in parts, by
SOAK_FAULTS=FIRST:END (0:300 unless set), such as SOAK_FAULTS=17:18.
"""

import math
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from problems import blobs, small_config
from processes import forced
from test_cli import finished, isgd
from test_multihost import free_port, visit

from isgd_jax.app import checkpoints
from isgd_jax.app.records import Record
from isgd_jax.app.run import fit
from isgd_jax.app.run_dir import RunDir
from isgd_jax.engines.contract import WorkersGone
from isgd_jax.engines.local_engine import DeviceWorker

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("failed_reads")]

FIRST, END = map(int, os.environ.get("SOAK_FAULTS", "0:300").split(":"))
SECONDS = 300
"""After which a process counts as hanging."""

SMALL = [
    "--hidden", "16", "--refresh-every", "20", "--log-every", "20", "--checkpoint-every", "20", "--chunk-size", "512",
    "--steps",
]  # fmt: skip
STEPS = 200
FLAGS = {
    "none": ["--mode", "uniform"],
    "inline": ["--mode", "exact"],
    "local": ["--mode", "relaxed", "--engine", "local"],
    "cluster": ["--mode", "relaxed", "--engine", "cluster", "--scorers", "1"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"mode": "uniform"},
    "inline": {"mode": "exact"},
    "local": {"mode": "relaxed", "engine": "local", "chunk_size": 10, "chunk_patience": 0.3},
}
EXACT = ("none", "inline")
"""Engines of which a run that was interrupted has the parameters of one that was not, bit for bit."""


class Place:
    """Where a trial is made, and what is the same for all: data, compiled programs, and runs without a fault."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self.seconds: dict[str, float] = {}
        self.wholes: dict[str, Path] = {}
        self.params: dict[str, Any] = {}
        self.folder = shared

    def start(self, *arguments: str, engine: str) -> subprocess.Popen[str]:
        """The command, with compiled programs of its own: one that is killed leaves half an entry there."""
        cache = self.folder / f"compiled-{len(list(self.folder.glob('compiled-*')))}"
        if (self.shared / "compiled").is_dir():
            shutil.copytree(self.shared / "compiled", cache)
        changes = {"XLA_FLAGS": forced(2 if engine == "local" else 1), "JAX_COMPILATION_CACHE_DIR": str(cache)}
        return isgd("train", *arguments, cwd=self.folder, JAX_PLATFORMS="cpu", **changes)

    def begin(self, engine: str, steps: int = STEPS) -> list[str]:
        """The arguments of a new run."""
        return ["--run-dir", "run", "--data-dir", str(self.shared / "data"), *FLAGS[engine], *SMALL, str(steps)]

    def whole(self, engine: str) -> Path:
        """A run of the command without a fault."""
        if engine not in self.wholes:
            folder, self.folder = self.folder, self.shared / engine
            self.folder.mkdir()
            for _ in range(2):  # the second with what the first compiled: so long do runs take from now on
                shutil.rmtree(self.folder / "run", ignore_errors=True)
                began = time.monotonic()
                well(self.start(*self.begin(engine), engine=engine))
                self.seconds[engine] = time.monotonic() - began
                caches = sorted(self.folder.glob("compiled-*"), key=lambda path: path.stat().st_mtime)
                shutil.copytree(caches[-1], self.shared / "compiled", dirs_exist_ok=True)
            self.wholes[engine], self.folder = self.folder / "run", folder
        return self.wholes[engine]


def well(process: subprocess.Popen[str]) -> None:
    code, out, err = finished(process, seconds=SECONDS)
    assert (code, err) == (0, ""), (code, err[-3000:], out[-500:])


def params_of(run: Path) -> Any:
    saved = checkpoints.read(run / "checkpoints")
    assert saved is not None
    return saved.tree["state"]["params"]


def check_finished(place: Place, engine: str, steps: int = STEPS) -> None:
    """The records are in order, the run is finished, and its parameters are those of a run without a fault."""
    run = RunDir(place.folder / "run")
    told = [record["step"] for record in run.records("progress")]
    assert told == sorted(set(told))
    last = list(run.records())[-1]
    assert (last["event"], last["step"]) == ("finished", steps)
    params = params_of(run.path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    if engine in EXACT and steps == STEPS:
        chex.assert_trees_all_equal(params, params_of(place.whole(engine)))


def left_behind(place: Place) -> list[str]:
    """Processes that still work for a trial: its folder of compiled programs is in their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"{place.folder}/compiled-".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def check_nothing_is_left(place: Place) -> None:
    """Ray's own agents look for the process that started them about once a minute: after kill -9 they stay so long."""
    deadline = time.monotonic() + 120
    while (left := left_behind(place)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


ENDS = {
    signal.SIGINT: (0, 128 + signal.SIGINT),
    signal.SIGTERM: (0, 128 + signal.SIGTERM, -signal.SIGTERM),
    signal.SIGKILL: (0, -signal.SIGKILL),
    signal.SIGSTOP: (0,),
}


def a_signal(place: Place, engine: str, rng: random.Random) -> str:
    """Between the first 100 ms and the end; stopped ones go on after a second, the others are resumed."""
    place.whole(engine)
    signum = rng.choice(list(ENDS))
    after = math.exp(rng.uniform(math.log(0.1), math.log(place.seconds[engine])))
    process = place.start(*place.begin(engine), engine=engine)
    time.sleep(after)
    process.send_signal(signum)
    if signum == signal.SIGSTOP:
        time.sleep(1.0)
        process.send_signal(signal.SIGCONT)
    code, out, err = finished(process, seconds=SECONDS)
    in_python = code == -signal.SIGINT and "entry.py" not in err  # the interpreter was still starting
    assert code in ENDS[signum] or in_python, (signum, after, code, err[-3000:])
    assert err in ("", "isgd: interrupted\n") or in_python, (signum, after, err[-3000:], out[-500:])
    check_nothing_is_left(place)
    begun = (place.folder / "run" / "config.json").exists()
    if code != 0 or not begun:
        well(place.start(*(["--resume", "run"] if begun else place.begin(engine)), engine=engine))
    check_finished(place, engine)
    check_nothing_is_left(place)
    return f"{signal.Signals(signum).name} after {after:.1f} s"


def several_processes(place: Place, engine: str, rng: random.Random) -> str:
    """Two or three begin a run in one folder, or go on with one: one does, the others are told who."""
    count, steps = rng.choice([2, 2, 3]), 3000
    resumes = rng.random() < 0.7
    if resumes:
        shutil.copytree(place.whole(engine), place.folder / "run")
    how = ["--resume", "run", "--steps", str(steps)] if resumes else place.begin(engine, steps)
    running = []
    for _ in range(count):
        running.append(place.start(*how, engine=engine))
        time.sleep(rng.choice([0.0, 0.3]))
    ended = [finished(process, seconds=SECONDS) for process in running]
    assert sorted(code for code, _, _ in ended) == [0, *[1] * (count - 1)], ended
    told = "is in use: " if resumes else "is there already"
    assert all(told in err and err.count("\n") == 1 for code, _, err in ended if code), ended
    check_finished(place, engine, steps)
    return f"{count} {'resume' if resumes else 'begin'}"


def family(root: int) -> list[int]:
    """A process and all that it started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
    return [root, *(member for child in children.get(root, []) for member in family(child))]


def listening(pids: list[int]) -> set[int]:
    """TCP ports that these processes have open."""
    inodes = set[str]()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                inodes.add(os.readlink(file))
            except OSError:
                continue
    rows = [row.split() for table in ("tcp", "tcp6") for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return {int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def strangers(place: Place, engine: str, rng: random.Random) -> str:
    """Requests, random bytes and closed connections at each port that a run, of one or two processes, has open."""
    together = engine == "inline" and rng.random() < 0.7
    if together:
        address = f"127.0.0.1:{free_port()}"
        places = ["--distributed", "--coordinator", address, "--num-processes", "2"]
        running = [
            place.start(*place.begin(engine, 10**6), *places, "--process-id", str(i), engine=engine) for i in range(2)
        ]
    else:
        running = [place.start(*place.begin(engine, 10**6), engine=engine)]
    run, deadline = RunDir(place.folder / "run"), time.monotonic() + SECONDS

    def wait_until_past(step: int) -> None:
        while not any(record["step"] > step for record in records(run)):
            assert all(process.poll() is None for process in running), [process.communicate() for process in running]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    wait_until_past(0)
    ports = listening([pid for process in running for pid in family(process.pid)])
    assert bool(ports) == (together or engine == "cluster"), ports
    with ExitStack() as left_open:
        for port in rng.sample(sorted(ports), len(ports)):
            visit(port, left_open)
        wait_until_past([record["step"] for record in records(run)][-1] + 200)
        running[-1].send_signal(signal.SIGTERM)
        for process in running:
            code, out, err = finished(process, seconds=SECONDS)
            assert code == 128 + signal.SIGTERM, (code, out[-500:], err[-3000:])
    check_nothing_is_left(place)
    return f"{len(ports)} ports{' of two processes' * together}"


def records(run: RunDir) -> list[Record]:
    return list(run.records("progress")) if run.path.is_dir() else []


def flip_a_bit(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


def cut_short(rng: random.Random, file: Path) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size + 1))


def remove(rng: random.Random, file: Path) -> None:
    file.unlink()


def fill_with_zeros(rng: random.Random, file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def fill_with_noise(rng: random.Random, file: Path) -> None:
    file.write_bytes(rng.randbytes(file.stat().st_size))


DAMAGES = [flip_a_bit, flip_a_bit, cut_short, remove, fill_with_zeros, fill_with_noise]


def undisturbed(place: Place, engine: str) -> Any:
    """Parameters of a whole run of this process."""
    if engine not in place.params:
        config = small_config(place.shared / f"{engine}-whole", **OPTIONS[engine])
        place.params[engine] = fit(config, dataset=blobs()).params
    return place.params[engine]


def stopped_at_35(place: Place, engine: str) -> Path:
    """A run of this process."""
    folder = place.shared / f"{engine}-stopped"
    if not folder.exists():
        config = small_config(folder, log_every=5, **OPTIONS[engine])
        fit(config, dataset=blobs(), until=lambda record: record["step"] == 35)
    return folder


def check_result(place: Place, engine: str, result: Any) -> None:
    assert result.step == 40
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(result.params)))
    if engine in EXACT:
        chex.assert_trees_all_equal(result.params, undisturbed(place, engine))


def a_damaged_checkpoint(place: Place, engine: str, rng: random.Random) -> str:
    """A file of the newest checkpoint, or of each file of it; the run goes on, from there or from the one before."""
    run = place.folder / "run"
    shutil.copytree(stopped_at_35(place, engine), run)
    newest = run / "checkpoints" / "35"
    damage = rng.choice(DAMAGES)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    for file in [rng.choice(files)] if rng.random() < 0.8 else files:
        damage(rng, file)
    seen: list[Record] = []
    config = small_config(run, log_every=5, **OPTIONS[engine])
    result = fit(config, dataset=blobs(), resume=True, observe=seen.append)
    check_result(place, engine, result)
    told = any("is damaged" in record.get("text", "") for record in seen)
    return f"{damage.__name__}, {'told' if told else 'harmless'}"


def a_full_disk(place: Place, engine: str, rng: random.Random) -> str:
    """A disk too small for the run, by a file system of its own; there comes room, and the run goes on."""
    disk, size = place.folder / "disk", round(math.exp(rng.uniform(math.log(8), math.log(800))))
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
    try:
        config, said = small_config(disk / "run", **OPTIONS[engine]), "fits"
        try:
            fit(config, dataset=blobs())
        except OSError as error:
            said = str(error)
            assert "space" in said.lower() or "disk" in said.lower(), said
            assert str(disk) in said, said
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        begun = (disk / "run" / "config.json").exists()
        result = fit(config, dataset=blobs(), resume=begun)
        check_result(place, engine, result)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
    return "fits" if said == "fits" else "full"


def can_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


def dies(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    if rng.random() < 0.2:
        raise RuntimeError("a worker died in mid-chunk")
    return scores


def leaves(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    if rng.random() < 0.05:
        raise SystemExit(3)
    return scores


def all_gone(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    raise RuntimeError("nobody is left")


def slow(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    threading.Event().wait(rng.choice([0.0, 0.0, 0.5]))
    return scores


def not_a_number(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(scores)) == rng.randrange(len(scores)), np.nan, scores).astype(scores.dtype)


def wrong_shape(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    return scores[: rng.randrange(len(scores) + 1)]


def other_data(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    device.fingerprint = "of other data"
    return scores


FAULTY = [dies, leaves, all_gone, slow, not_a_number, wrong_shape, other_data]
HONEST: Callable[[DeviceWorker, Any], np.ndarray] = DeviceWorker.finish


def faulty_workers(place: Place, engine: str, rng: random.Random) -> str:
    """At random moments; some runs are stopped by SIGTERM and resumed as well.

    A relaxed run always ends; its parameters are finite, and its replay, without any fault, gives them bit for bit. An
    exact run ends with the very parameters of a run without faults, or says that nobody is left.
    """
    fault, mode = rng.choice(FAULTY), rng.choice(["relaxed", "relaxed", "exact"])
    begins, stops, trouble = rng.randrange(40), rng.choice([None, 10, 20, 30]), threading.Event()

    def finish(self: DeviceWorker, started: Any) -> np.ndarray:
        scores = HONEST(self, started)
        return fault(rng, self, scores) if trouble.is_set() else scores

    def observe(record: Record) -> None:
        if record.get("step", 0) >= begins:
            trouble.set()
        if record["event"] == "progress" and record["step"] == stops:
            os.kill(os.getpid(), signal.SIGTERM)

    config = small_config(place.folder / "run", **(OPTIONS["local"] | {"mode": mode}))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DeviceWorker, "finish", finish)
        try:
            result: Any = fit(config, dataset=blobs(), observe=observe)
        except WorkersGone:
            assert mode == "exact"
            result = None
    if result is None or result.stopped_by is not None:
        result = fit(config, dataset=blobs(), resume=True)
    check_result(place, engine, result)
    if mode == "exact" and fault is not not_a_number:
        chex.assert_trees_all_equal(result.params, undisturbed(place, "inline"))
    if mode == "relaxed" and fault is not not_a_number:
        again = small_config(place.folder / "again", replay=str(place.folder / "run"), **OPTIONS["local"])
        chex.assert_trees_all_equal(fit(again, dataset=blobs()).params, result.params)
    return f"{fault.__name__}, {mode}"


ALL = ("none", "inline", "local", "cluster")
FAULTS: list[tuple[int, Callable[[Place, str, random.Random], str], tuple[str, ...]]] = [
    (24, a_signal, ("none", "inline", "local", "none", "inline", "local", "cluster")),
    (7, several_processes, ("none", "inline", "local", "none", "inline", "local", "cluster")),
    (5, strangers, ALL),
    (22, a_damaged_checkpoint, ("none", "inline", "local")),
    (22 if can_mount() else 0, a_full_disk, ("none", "inline", "local")),
    (20, faulty_workers, ("local",)),
]
"""What may happen, how often, and to which engines."""


@pytest.mark.timeout(6 * 3600)
def test_of_three_hundred_faults_none_hangs_none_corrupts_and_each_run_ends_right_or_resumes(tmp_path: Path) -> None:
    place, counted, failed = Place(tmp_path), Counter[str](), list[str]()
    for trial in range(FIRST, END):
        rng, began = random.Random(trial), time.monotonic()
        _, fault, engines = rng.choices(FAULTS, [weight for weight, _, _ in FAULTS])[0]
        engine, place.folder = rng.choice(engines), tmp_path / str(trial)
        place.folder.mkdir()
        try:
            how = fault(place, engine, rng)
            shutil.rmtree(place.folder, ignore_errors=True)
            counted[f"{fault.__name__} with {engine}"] += 1
        except Exception:
            failed.append(f"trial {trial}, {fault.__name__} with {engine}:\n{traceback.format_exc(limit=-8)}")
            how = f"FAILED\n{failed[-1]}"
        print(f"{trial}: {fault.__name__}, {engine}: {how}; {time.monotonic() - began:.0f} s", flush=True)
    print(*(f"{count:4} {what}" for what, count in sorted(counted.items())), sep="\n")
    assert not failed, "\n".join(failed)
