"""What the protocol's model explores: configurations that must hold, and mutants, each of which must be caught."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """What takes part. Extents are strings of chunks: "ab" covers "a"."""

    versions: int = 4
    """Longest history explored (before a rebuild)."""
    writers: tuple[tuple[str, ...], ...] = ()
    """For each writer, the extents it stores one after another."""
    handover: bool = False
    """Writers put extents into the inbox while their replica names a leader."""
    polls: bool = False
    """Writers may follow the log before they name an extent."""
    leaders: tuple[int, ...] = ()
    """For each leader, how often it may take the lead."""
    gcs: tuple[int, ...] = ()
    """For each collector, how many commits it may make."""
    merges: bool = False
    """Collectors merge the inbox (beyond their commits)."""
    checkpointers: tuple[int, ...] = ()
    """For each checkpointer, how many checkpoints it may write."""
    accessors: int = 0
    """Processes that once record a last access."""
    readers: int = 0
    """Follow the log."""
    cold: int = 0
    """Open from the newest checkpoint, then follow."""
    rebuilds: int = 0
    """Rebuilds, one after another; each may crash at any step."""
    loss: bool = False
    """Others deleted versions above the newest checkpoint before the rebuild; collectors are ended, not stalled."""
    after: int = 1
    """Versions explored beyond those a rebuild makes."""
    deaths: tuple[str, ...] = ()
    """Roles that may die for good: leaders, and writers that handed over (I8 is about those who live)."""
    ahead: int = 1
    """The fence is this many milestones above."""
    lost: bool = True
    """Answers of creates may be lost."""
    late: int = 0
    """Budget of late or repeated effects,"""
    kinds: tuple[str, ...] = ()
    """… of these requests."""


A, B = ("a",), ("b",)
CONFIGS = {
    "fence": Config(4, (A, ("b", "c")), checkpointers=(1,), gcs=(0,), late=1, kinds=("create",)),
    "fence-reader": Config(4, (A, ("b", "c")), checkpointers=(1,), gcs=(0,), readers=1, lost=False),
    "sweep": Config(4, (A, B), gcs=(2,), late=1, kinds=("put", "del-obj")),
    "sweep-born": Config(4, (A, B), gcs=(2,), late=1, kinds=("put",), polls=True, lost=False),
    "two-gcs": Config(4, (A, B), gcs=(1, 1), lost=False),
    "late-deletes": Config(
        4, (A, ("b", "c")), checkpointers=(1,), gcs=(0,), lost=False, late=1, kinds=("del-log", "index")
    ),
    "checkpoints": Config(4, (("a", "b"),), checkpointers=(1, 1), gcs=(0,), cold=1, lost=False),
    "open": Config(4, (("a", "b", "c"),), checkpointers=(2,), gcs=(0,), cold=1, lost=False),
    "two-collectors": Config(3, (("a", "b"),), checkpointers=(1, 1), gcs=(0, 0), lost=False),
    "leaders": Config(3, (A, B), handover=True, leaders=(1, 1), lost=False),
    "leaders-late": Config(4, (A,), handover=True, leaders=(1, 1), late=1, kinds=("inbox", "del-inbox"), lost=False),
    "leaders-lost": Config(4, (A,), handover=True, leaders=(1, 1), deaths=("leader",)),
    "leader-gc": Config(4, (A,), handover=True, leaders=(1,), gcs=(1,), late=1, kinds=("inbox", "put")),
    "gc-merge": Config(4, (A,), handover=True, leaders=(1,), gcs=(1,), merges=True, deaths=("leader", "writer")),
    "covered": Config(4, (("ab",), A), gcs=(2,), late=1, kinds=("put",)),
    "covered-inbox": Config(4, (("ab",), A), handover=True, leaders=(1,), gcs=(1,), lost=False),
    "access": Config(4, (A,), gcs=(1,), accessors=1, late=1, kinds=("create",)),
    "rebuild": Config(2, (A, B), gcs=(1,), rebuilds=1, ahead=2, lost=False),
    "rebuild-checkpoint": Config(2, (A,), checkpointers=(1,), gcs=(1,), rebuilds=1, ahead=2),
    "rebuild-late": Config(2, (A,), gcs=(1,), rebuilds=1, ahead=2, late=1, kinds=("create", "del-obj", "put")),
    "rebuild-twice": Config(2, (A,), readers=1, rebuilds=2, ahead=2, lost=False),
    "rebuild-inbox": Config(
        2, (A,), handover=True, leaders=(1,), gcs=(1,), merges=True, rebuilds=1, ahead=2, lost=False
    ),
    "rebuild-loss": Config(3, (A, B), checkpointers=(1,), readers=1, rebuilds=1, ahead=2, loss=True, lost=False),
}

_FENCE = Config(4, (A, ("b", "c")), checkpointers=(1,), gcs=(0,))
_BEHIND = Config(4, (("a", "b", "c"),), checkpointers=(1,), gcs=(0,), readers=1, lost=False)
_SWEEP = Config(4, (A, B), gcs=(2,))
_CHECKPOINT = Config(4, (("a", "b", "c"),), checkpointers=(1, 1), gcs=(0,), cold=1, lost=False)
_LEAD = Config(4, (A,), handover=True, leaders=(1,), deaths=("leader",), lost=False)
_LEFT = _LEAD._replace(gcs=(1,), merges=True, deaths=("leader", "writer"))
_REBUILDS = Config(2, (A, B), gcs=(1,), rebuilds=1, ahead=2, lost=False)
MUTANTS = {
    "no_fence_writer": (_FENCE, "a won create is believed without the fence"),
    "fence_first": (_FENCE, "the fence is asked before the create, not after"),
    "no_fence_reader": (_FENCE._replace(readers=1, lost=False), "versions are applied without the fence"),
    "fence_of_last": (_FENCE, "the fence of the batch's last version is asked, not of its first"),
    "no_idle_fence": (_BEHIND, "an empty poll never asks for the fence"),
    "milestone_deleted": (
        _FENCE._replace(writers=(A, ("b", "c", "d", "e")), lost=False),
        "milestones are deleted as well",
    ),
    "no_checkpoint_rule": (_BEHIND, "versions are deleted though no checkpoint covers them"),
    "plain_put": (_FENCE, "versions are plain PUTs"),
    "conflict_is_success": (_FENCE, "a lost create counts as won"),
    "unknown_is_success": (_FENCE, "a create without answer counts as won"),
    "commit_first": (_SWEEP, "the commit precedes the upload"),
    "same_name": (_SWEEP._replace(writers=(A, A)), "two uploads of one prefix share a name"),
    "sweep_by_age": (_SWEEP, "orphans are deleted by age, without raising the floor"),
    "no_void_rule": (_SWEEP, "adds born below the floor are accepted"),
    "delete_before_confirm": (_SWEEP, "victims are deleted before their removal is confirmed"),
    "inbox_early": (_LEAD._replace(writers=(A, B)), "inbox objects go before their version is confirmed"),
    "index_first": (_CHECKPOINT, "a checkpoint's index is put before its segments"),
    "sweep_newest": (_CHECKPOINT, "segments not older than the newest checkpoint are swept"),
    "covered_early": (
        Config(4, (("ab",), A), handover=True, leaders=(1, 1), lost=False),
        "inbox objects covered by others of the same round go before those are confirmed",
    ),
    "covered_swept": (
        Config(4, (("ab",), A), handover=True, leaders=(1,), gcs=(1,), lost=False),
        "a writer whose extent is covered deletes its objects at once",
    ),
    "handover_forgotten": (_LEAD, "a hand-over is forgotten when the leader steps down"),
    "no_timeout": (_LEAD, "a hand-over waits for as long as a leader is named"),
    "gc_no_merge": (_LEFT, "collectors leave the inbox alone"),
    "gc_sweeps_inbox": (_LEFT, "inbox objects are deleted by age"),
    "access_revives": (Config(4, (A,), gcs=(1,), accessors=1), "an access makes a removed extent live again"),
    "rebuild_no_milestones": (_REBUILDS, "rebuild creates no milestones"),
    "rebuild_checkpoint_first": (_REBUILDS, "rebuild puts its checkpoint before the milestones"),
    "rebuild_last_late": (_REBUILDS, "rebuild puts its checkpoint before the last of the milestones"),
    "rebuild_at_fence": (_REBUILDS, "rebuild goes on at the fence of the tip, not beyond it"),
    "rebuild_low_floor": (_REBUILDS, "rebuild starts with floor 0"),
    "rebuild_low_tip": (
        Config(4, (("a", "b", "c"), B), rebuilds=1, loss=True, lost=False),
        "rebuild takes the newest checkpoint for the tip",
    ),
    "rebuild_not_offline": (
        Config(3, (A,), gcs=(1,), rebuilds=1, ahead=2, loss=True, lost=False),
        "versions were lost, and a collector that was at work goes on after the rebuild",
    ),
    "rebuild_revives": (_REBUILDS, "rebuild takes objects that a collector may be deleting"),
}
"""Each breaks one rule; the model, under the configuration beside it, must find a violation."""
