"""The exhaustive model of the protocol: it holds as specified, and each rule it is made of is needed.

The quick set explores small configurations whole and some mutants; the slow one everything the module lists.
"""

from __future__ import annotations

import pytest

from lmcache_s3.testing.protocol_configs import CONFIGS, MUTANTS, Config
from lmcache_s3.testing.protocol_model import Model, main

SMALL = {
    "commits": Config(3, (("a",), ("b",)), checkpointers=(1,), gcs=(0,), late=1, kinds=("create",)),
    "sweep": Config(3, (("a",),), gcs=(2,), late=1, kinds=("put", "del-obj")),
    "lead": Config(3, (("a",),), handover=True, leaders=(1,), deaths=("leader",)),
    "covered": Config(3, (("ab",), ("a",)), gcs=(1,), lost=False),
    "access": Config(3, (("a",),), gcs=(1,), accessors=1, lost=False),
    "rebuild": Config(2, (("a",),), gcs=(1,), rebuilds=1, ahead=2, late=1, kinds=("create", "del-obj", "put")),
}
QUICK_MUTANTS = (
    "plain_put",
    "no_fence_writer",
    "sweep_by_age",
    "inbox_early",
    "handover_forgotten",
    "gc_no_merge",
    "access_revives",
    "rebuild_checkpoint_first",
    "rebuild_low_floor",
)


@pytest.mark.parametrize("name", SMALL)
def test_small_configurations_hold(name: str) -> None:
    found = Model(SMALL[name]).explore()
    assert found.violation is None, "\n".join(found.trace)
    assert found.states > 500  # a model in which nothing can happen proves nothing


@pytest.mark.parametrize("name", QUICK_MUTANTS)
def test_some_mutants_are_caught(name: str) -> None:
    assert Model(MUTANTS[name][0], name).explore().violation is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_hold(name: str) -> None:
    found = Model(CONFIGS[name]).explore()
    assert found.violation is None, "\n".join(found.trace)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    """And only because of the mutation: within as many states the protocol itself holds."""
    config = MUTANTS[name][0]
    found = Model(config, name).explore()
    assert found.violation is not None
    if "not_offline" not in name:
        held = Model(config).explore(min(found.states, 20_000))
        assert held.violation is None, "\n".join(held.trace)


def test_a_trace_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", "unknown_is_success"]) == 0
    out = capsys.readouterr().out
    assert "I1" in out
    assert "creates {add a#0.0@0} as 1 unknown" in out
    assert main(["mutants", "nonsense"]) == 2
