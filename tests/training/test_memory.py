"""`--micro-rows auto`: the most sequences whose compiled step fits, known before the run."""

from dataclasses import replace

import jax
import pytest
from tiny_recipes import tiny

from golf_jax.config import GolfError, Recipe, from_dict, to_dict
from golf_jax.mesh import make_mesh
from golf_jax.model import resolve
from golf_jax.training.memory import choices, fitted, free_bytes, program_bytes
from golf_jax.training.phases import phases
from golf_jax.training.state import graph
from golf_jax.training.step import compile_step, micro_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def auto():
    recipe = tiny("baseline", seq_len=64, rows_per_rank=8)
    recipe = replace(recipe, model=replace(recipe.model, num_layers=1, xsa_last_n=0))
    return replace(recipe, model=resolve(recipe.model, "cpu"), micro_rows="auto")


def quiet(line: str) -> None:
    pass


def test_auto_goes_through_json(auto):
    assert from_dict(Recipe, to_dict(auto)) == auto
    with pytest.raises(GolfError, match="expected int, found 'most'"):
        from_dict(Recipe, to_dict(auto) | {"micro_rows": "most"})


def test_all_of_a_rank_where_it_fits_and_what_is_fixed_stays(auto):
    assert fitted(auto, make_mesh(1), quiet, needs=lambda r: 1).micro_rows == 8
    assert fitted(replace(auto, micro_rows=2), make_mesh(1), quiet, free=0).micro_rows == 2


def test_fewer_where_it_does_not_and_one_line_where_nothing_does(auto):
    tried = []

    def needs(r):
        tried.append(r.micro_rows)
        return 100 + 100 * r.micro_rows

    assert choices(auto, 1) == [8, 4, 2, 1]
    assert fitted(auto, make_mesh(1), quiet, free=400, needs=needs).micro_rows == 2
    assert tried == [8, 2], "4 cannot fit if memory grows with the sequences, so it is not compiled"
    with pytest.raises(GolfError, match="one sequence of 64 tokens takes"):
        fitted(auto, make_mesh(1), quiet, free=100, needs=needs)


def test_the_compiled_step_says_what_it_takes(auto):
    mesh, two = make_mesh(1), replace(auto, data=replace(auto.data, rows_per_rank=2))
    (phase,) = phases(two)
    needed = [program_bytes(compile_step(graph(replace(two, micro_rows=n)), mesh, phase).run) for n in (1, 2)]
    assert needed[0] < needed[1]
    found = [fitted(two, mesh, quiet, free=int(n / 0.9) + 1) for n in needed]
    assert [micro_rows(r, 1) for r in found] == [1, 2]
    assert compile_step(graph(found[0]), mesh, phase).seconds > 0.01, "what was compiled to find out is told with the time it took"
    assert free_bytes(mesh) > 1e6 and jax.default_backend() == "cpu"
