"""A world in which the real manifest code (`lmcache_s3.index`) runs one store request at a time, in any order.

Every process is a greenlet that stops at each request until the scheduler lets it take one step and says what becomes
of the request: answered, answer lost, dropped, carried out late or twice. A process that is never stepped again has
crashed; one that is stepped much later was stalled. The roles are the real ones (`Log`, `Follower` with its hand-overs
and leader, `Inbox`, `Collector`, `rebuild`); only their policy is replaced by whim, since safety must not rest on it:
when to lead, what to collect, how old anything is. The world keeps the true history beside the store and checks, after
each step, what FORMAT.md promises. Deterministic: the same steps give the same run.

The parts: `manifest_process`, what stops at each request; `manifest_roles`, what it does there; `manifest_world`, the
store, the history and the checks. Here are the casts and the seeded runs.

Raises `Violation`, naming the broken invariant:
  prefix    (I1) a published replica is a prefix of the history
  ack       (I2) what a commit reports is so
  durable   (I3) the objects of every extent that the history keeps live exist
  contents  (I4) bytes behind a name never change
  openable  (I5) the newest checkpoint is whole, and every later version can be read
  handover  (I6) an inbox object is deleted only when the history has judged all of it
  history   (I7) version numbers are genuinely created once, without gaps
  progress  (I8) when everybody runs on, every store is answered, every reader sees the whole history, and nothing that
                 was handed over lies in the inbox for ever
"""

from __future__ import annotations

import random

from lmcache_s3.testing.manifest_process import AS_IT_IS, Fate, Process, Rules, Violation
from lmcache_s3.testing.manifest_roles import checkpointer, collector, follower, reader, sweeper, writer
from lmcache_s3.testing.manifest_world import INBOX, LOG, World

CASTS = ("direct", "followers", "mixed", "log", "rebuild")
_DELTA_WRITES = ("put", "create", "delete")


def populate(world: World, cast: str, extents: int = 10) -> None:
    """direct: writers that commit. followers: writers that hand over and lead. mixed: both. log: a long history, of
    which little is left. rebuild: as direct, but in `play` there always is a rebuild that crashes."""
    first, second = {
        "direct": (writer, writer),
        "followers": (follower, follower),
        "mixed": (follower, writer),
        "log": (writer, writer),
        "rebuild": (writer, writer),
    }[cast]
    if cast == "log":
        world.prompts = 1000
        world.add("sweeper", sweeper)
    world.add("writer-a", first(extents))
    world.add("writer-b", second(extents), checkpoint_every=2)
    if cast in ("followers", "log"):
        world.add("writer-c", first(extents))
    world.add("reader", reader)
    world.add("checkpointer", checkpointer)
    if cast != "log":
        world.add("collector", collector)
    if cast == "direct":
        world.add("collector", collector)


def play(seed: int, rules: Rules = AS_IT_IS, *, steps: int = 1000, cast: str | None = None) -> World:
    """One seeded run: random turns, with long stalls, mostly of processes that are about to write. Some runs have a
    rebuild in their middle, or a writer that crashes."""
    rng = random.Random(seed)
    world = World(rules=rules, seed=seed)
    try:
        cast = cast or CASTS[seed % len(CASTS)]
        populate(world, cast)
        faults = rng.choice([0.0, 0.05, 0.2])
        crashes = cast == "rebuild"
        rebuild_at = rng.randrange(steps // 2) if crashes or rng.random() < 0.2 else None
        asleep: dict[Process, int] = {}
        for now in range(steps):
            if now == rebuild_at:
                world.rebuild(rng.choice(range(8)) if crashes or rng.random() < 0.5 else None)
                world.check()
            awake = [p for p in world.processes if not p.ended and not p.crashed and asleep.get(p, 0) <= now]
            if awake:
                _turn(world, rng.choice(awake), rng, faults, asleep, now)
        world.finish()
    except Violation as e:
        raise Violation(f"seed {seed}: {e}") from e
    finally:
        world.close()
    return world


def halt(seed: int, who: int, request: int, *, forever: bool, cast: str = "mixed") -> bool:
    """A seeded run without other faults in which process `who` stops before its request number `request`: it crashed
    (`forever`), or goes on when all others have done what they wanted. Whether it came so far."""
    rng = random.Random(seed)
    world = World(seed=seed)
    try:
        populate(world, cast, extents=5)
        halted, made = world.processes[who], 0
        for _ in range(600):
            awake = [p for p in world.processes if not p.ended and (p is not halted or made < request)]
            process = rng.choice(awake)
            made += process is halted
            process.step()
            world.check()
        reached = made == request and not halted.ended
        halted.crashed = True
        world.finish()
        halted.crashed = forever
        world.finish()
    except Violation as e:
        raise Violation(f"seed {seed}, {halted.name} halts before request {request}: {e}") from e
    finally:
        world.close()
    return reached


def _turn(
    world: World, process: Process, rng: random.Random, faults: float, asleep: dict[Process, int], now: int
) -> None:
    verb, key = process.at or ("", "")
    about_to_create = verb == "create" and key.startswith(LOG)
    if rng.random() < (0.3 if about_to_create else 0.1 if verb == "delete" else 0.02):
        asleep[process] = now + rng.randrange(20, 600 if process.name == "reader" else 250)
        return
    if key.startswith(INBOX) and process.name.startswith("writer") and rng.random() < 0.02:
        process.crashed = True
        return
    fate = Fate.OK
    if rng.random() < (faults if verb in _DELTA_WRITES else faults / 4):
        fate = rng.choice(list(Fate))
    process.step(fate)
    if world.air and rng.random() < 0.05:
        world.deliver(rng.randrange(len(world.air)))
    world.check()
