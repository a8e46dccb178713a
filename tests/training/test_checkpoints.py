"""Checkpoints: what comes back is what was saved, or it is refused; a damaged one costs no more than itself."""

import errno
import json
import os
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from made_runs import KEPT
from tiny_recipes import SHIPPED, tiny

from golf_jax.config import GolfError
from golf_jax.mesh import REPLICATED, ROWS, make_mesh
from golf_jax.model import resolve
from golf_jax.training import checkpoints
from golf_jax.training.checkpoints import Checkpoints, check_same_shapes, digests
from golf_jax.training.state import TrainState, init_state, state_shapes

pytestmark = pytest.mark.usefixtures("quick_compilation")
RECIPE = tiny("baseline")
RECIPE = replace(RECIPE, model=resolve(RECIPE.model, "cpu"))
FACTS = KEPT | {"position": {}, "seconds": 1.0}


@pytest.fixture(scope="module")
def state() -> TrainState:
    return init_state(RECIPE, make_mesh(2), 0)


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory) -> Path:
    """Steps 5 and 10."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder)
    for step in (5, 10):
        changed = state._replace(params={name: p + step for name, p in state.params.items()})
        checkpoints.save(step, changed, **FACTS | {"position": {"batches": step}, "seconds": 1.5 * step}, wait=True)
    checkpoints.close()
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restore(folder: Path, lines: list[str] | None = None):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(state_shapes(RECIPE, make_mesh(2)), (lines if lines is not None else []).append)
    finally:
        checkpoints.close()


def test_the_newest_comes_back_whole(state, copy):
    found = restore(copy)
    assert found.step == 10 and found.meta["position"] == {"batches": 10} and found.meta["seconds"] == 15.0
    for name, p in state.params.items():
        np.testing.assert_array_equal(found.state.params[name], p + 10)
    assert restore(copy.parent / "none") is None


def test_what_is_said_to_be_saved_outlives_a_power_loss(state, tmp_path, monkeypatch):
    """All files of the checkpoint and the folders that name them; orbax syncs the arrays alone."""
    synced = []
    monkeypatch.setattr(checkpoints, "sync", synced.append)
    kept = Checkpoints(tmp_path / "checkpoints")
    kept.save(5, state, position={})
    assert synced == []  # in the background
    kept.wait()
    assert {*(tmp_path / "checkpoints/5").rglob("*"), tmp_path / "checkpoints/5", tmp_path / "checkpoints"} == {*synced}
    kept.wait()
    assert len(synced) == len({*synced})  # once
    kept.close()


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_costs_the_older_checkpoint_and_never_the_newest(state, copy, monkeypatch, full):
    """Two fill the disk: a third has no room beside them, and the state that is kept would grow old."""
    kept = Checkpoints(copy)
    with monkeypatch.context() as patch:
        patch.setattr(kept._manager, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(full, os.strerror(full))))
        with pytest.raises(GolfError, match=rf"checkpoint 15 cannot be written \({os.strerror(full)}\); 5 given up for room$"):
            kept.save(15, state, **FACTS, wait=True)
        with pytest.raises(GolfError, match=rf"{os.strerror(full)}\)$"):
            kept.save(16, state, **FACTS, wait=True)
    kept.save(20, state, **FACTS, wait=True)
    kept.close()
    assert restore(copy).step == 20


def test_a_checkpoint_that_a_full_disk_left_unsynced_does_not_stand_for_those_before(state, copy, monkeypatch):
    """It lies there under its own name, and may be empty after a power loss."""
    kept = Checkpoints(copy)
    kept.restore(state_shapes(RECIPE, make_mesh(2)), pytest.fail)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "sync", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(GolfError, match=r"checkpoint 15 cannot be written \(No space left on device\)"):
            kept.save(15, state, **FACTS, wait=True)
    assert kept.steps() == [10]
    kept.save(20, state, **FACTS, wait=True)
    kept.close()
    assert restore(copy).step == 20


def test_the_reason_of_the_system_is_told_and_not_cut_off_behind_paths(state, copy, monkeypatch):
    kept = Checkpoints(copy)
    said = f"PERMISSION_DENIED: Failed writing: {'/long' * 100!r}: Failed to open [os_error_code='{errno.EROFS}']"
    monkeypatch.setattr(kept._manager, "save", lambda *_, **__: (_ for _ in ()).throw(ValueError(said)))
    with pytest.raises(GolfError, match=rf"checkpoint 15 cannot be written \({os.strerror(errno.EROFS)}\)$"):
        kept.save(15, state, **FACTS, wait=True)
    kept.close()


def test_half_a_checkpoint_does_not_stay_behind_a_run(copy):
    """A thread of tensorstore may write on while a full disk has it removed, and make its folder anew."""
    kept = Checkpoints(copy)
    whole = kept.steps()
    (copy / "99.orbax-checkpoint-tmp/state").mkdir(parents=True)
    kept.close()
    assert sorted(path.name for path in copy.iterdir()) == sorted(map(str, whole))


@pytest.mark.parametrize("name", [*SHIPPED, "pr2135"])
def test_the_state_of_every_recipe_comes_back(name, tmp_path):
    """Averages, stale gradients, low-precision copies: whatever a recipe's state is made of."""
    recipe = tiny(name, numerics="as_run")
    recipe, mesh = replace(recipe, model=resolve(recipe.model, "cpu")), make_mesh(1)
    state = init_state(recipe, mesh, 0)
    assert (state.swa is not None) == bool(recipe.schedule.swa_every)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, state, **FACTS, wait=True)
    found = checkpoints.restore(state_shapes(recipe, mesh), pytest.fail)
    checkpoints.close()
    assert found is not None
    jax.tree.map(np.testing.assert_array_equal, found.state, state)


def test_any_changed_element_changes_the_digest(state):
    base = jax.device_get(digests(state.params)[0])
    for name, p in state.params.items():
        for bit in (0, 31):
            flipped = np.asarray(p).copy().reshape(-1)
            flipped.view(np.uint32)[len(flipped) // 2] ^= np.uint32(1 << bit)
            other = jax.device_get(digests({name: flipped.reshape(p.shape)})[0])
            assert (other[name] != base[name]).all()
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    padded = np.concatenate([matrix, np.zeros((2, 3), np.float32)])
    np.testing.assert_array_equal(digests({"x": matrix})[0]["x"], digests({"x": padded})[0]["x"])


def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_taken(copy):
    """The arrays of orbax carry no checksum of their own."""
    file = max((f for f in (copy / "10").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    for at in range(len(data) // 3, len(data) - 1, len(data) // 3):
        data[at] ^= 16
    file.write_bytes(bytes(data))
    lines: list[str] = []
    assert restore(copy, lines).step == 5
    assert len(lines) == 1 and lines[0].startswith("checkpoint 10 is damaged and set aside as ") and "\n" not in lines[0]
    assert (copy / "10.damaged").is_dir() and not (copy / "10").exists()


def test_what_orbax_leaves_unawaited_is_not_told(monkeypatch):
    """Beside a damaged checkpoint, sometimes, whenever it is collected as garbage."""

    async def metadata():
        pass

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoints._set_up.__wrapped__()
        metadata()
    assert not caught


def test_arrays_of_one_step_with_the_facts_of_another_are_refused(copy):
    shutil.rmtree(copy / "10/state")
    shutil.copytree(copy / "5/state", copy / "10/state")
    lines: list[str] = []
    assert restore(copy, lines).step == 5 and "is not what was saved" in lines[0]


@pytest.mark.parametrize("value", [7, -3, "x", None])
def test_altered_facts_are_refused(copy, value):
    (file,) = (copy / "10/meta").rglob("metadata")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": value}))
    lines: list[str] = []
    assert restore(copy, lines).step == 5 and "checkpoint 10 is damaged" in lines[0]


def test_a_file_in_its_place_is_refused_at_once(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(GolfError, match="checkpoints: cannot be opened .*File exists"):
        Checkpoints(tmp_path / "checkpoints")


def test_nothing_sound_is_an_error(copy):
    for step in ("5", "10"):
        for file in (copy / step / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
    with pytest.raises(GolfError, match=r"no checkpoint can be read \(10, 5 are damaged\)"):
        restore(copy)


def test_a_state_that_is_not_finite_is_never_saved(state, tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    bad = state._replace(params=state.params | {"q": state.params["q"] * np.nan})
    with pytest.raises(GolfError, match="step 3: the weights are not finite"):
        checkpoints.save(3, bad)
    assert checkpoints.steps() == []
    checkpoints.close()


def test_only_the_padding_of_batches_may_differ_on_resume():
    def state(matrices: int, width: int) -> dict:
        lies = lambda spec, *shape: jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(make_mesh(1), spec))  # noqa: E731
        return {"opt": {"matrix": {"8x8": lies(ROWS, matrices, 8, width)}}, "params": {"q": lies(REPLICATED, 3, width)}}

    check_same_shapes(state(8, 8), state(6, 8))
    for other in (state(8, 4), state(8, 8) | {"params": {"q": state(8, 8)["opt"]["matrix"]["8x8"]}}):
        with pytest.raises(ValueError, match=r"has the shape \(.*\) there and \(.*\) here"):
            check_same_shapes(state(8, 8), other)
    with pytest.raises(ValueError, match="opt.matrix.8x8 is only here"):
        check_same_shapes(state(8, 8), {"opt": {}})


def test_reads_that_fail_beside_the_one_that_is_told_print_nothing(monkeypatch):
    """Orbax drops their coroutines; what else cannot be raised is still told."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable.object))
    checkpoints._set_up.__wrapped__()
    for file in ("/lib/orbax/checkpoint/serialization.py", "/home/me/orbax.py"):
        code = compile("async def f(): pass", file, "exec")
        exec(code, names := {})
        made = names["f"]()
        sys.unraisablehook(SimpleNamespace(exc_value=Exception("array index"), object=made))
        made.close()
    sys.unraisablehook(SimpleNamespace(exc_value=Exception("x"), object=None))
    assert [getattr(x, "cr_code", None) and x.cr_code.co_filename for x in seen] == ["/home/me/orbax.py", None]
