"""The main job's data, formula, training loop and report."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compat
from haiku_mlp.masses import chart, nuclides, report, training
from haiku_mlp.masses.formula import Formula, features, terms

TRAIN, TEST = nuclides.measured()
SMALL = training.Settings(hidden_dims=(8,), members=2, steps=150, batch_size=64)


# Data


def test_nuclides_are_those_of_the_literature():
    assert (len(TRAIN), len(TEST)) == (2149, 219)
    assert min(TRAIN.z.min(), TRAIN.n.min(), TEST.z.min(), TEST.n.min()) == 8
    assert not set(TRAIN.numbers()) & set(TEST.numbers())
    assert (~TRAIN.among(nuclides.read("AME1995"))).sum() == 389


def test_masses_are_mass_excesses_in_mev():
    table = dict(zip(TRAIN.numbers(), TRAIN.mass_excess.tolist(), strict=True))
    assert table[82, 126] == pytest.approx(-21.748, abs=1e-3)
    assert table[92, 146] == pytest.approx(47.309, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "error"),
    [("FRDM95", 0.656), ("DUZU", 0.360), ("HFB14", 0.729), ("KTUY05", 0.653), ("AME2003all", 0.0)],
)
def test_models_have_their_published_errors_on_ame2003(name, error):
    table = nuclides.read(name)
    predicted = np.array([table[key] for key in TRAIN.numbers()])
    assert training.rms(predicted - TRAIN.mass_excess) == pytest.approx(error, abs=0.002)


@pytest.mark.parametrize(
    ("name", "count"),
    [("MAJA88", 203), ("ETFSI12", 214), ("TCSM12", 207), ("TCSM13", 207)],
)
def test_coverage_of_the_models_that_lack_test_nuclides(name, count):
    assert TEST.among(nuclides.read(name)).sum() == count


def test_the_other_models_cover_all_test_nuclides():
    complete = [p.table for p in nuclides.PUBLISHED if TEST.among(nuclides.read(p.table)).all()]
    assert len(complete) == len(nuclides.PUBLISHED) - 4


def test_the_models_are_listed_oldest_first():
    years = [model.year for model in nuclides.PUBLISHED]
    assert years == sorted(years)
    assert sorted(set(years)) == [1988, 1995, 2005, 2007, 2010, 2011, 2012, 2013]


def test_which_models_postdate_the_test_data():
    after = {model.table for model in nuclides.PUBLISHED if model.postdates_test}
    assert after == {"BR2013", "HFB26", "SVM13", "TCSM13"}


# Formula and features


def test_formula_fits_by_least_squares():
    formula = Formula.fit(TRAIN)
    residual = formula.mass_excess(TRAIN) - TRAIN.mass_excess
    assert training.rms(residual) == pytest.approx(2.368, abs=0.001)
    columns = np.stack(list(terms(TRAIN.z, TRAIN.n).values()), axis=-1)
    # Normal equations: no term explains anything of what is left.
    assert np.abs(columns.T @ residual).max() < 1e-8 * np.abs(columns).sum()


def test_formula_recovers_its_own_coefficients():
    known = Formula({"volume": 15.7, "surface": 17.6, "Coulomb": 0.71, "asymmetry": 23.4})
    masses = dataclasses.replace(TRAIN, mass_excess=known.mass_excess(TRAIN))
    fitted = Formula.fit(masses, known.coefficients)
    assert fitted.coefficients == pytest.approx(known.coefficients, rel=1e-6)


def test_doubly_magic_nuclides_have_no_valence_nucleons():
    z, n = np.array([2, 8, 20, 20, 28, 50, 50, 82]), np.array([2, 8, 20, 28, 28, 50, 82, 126])
    columns = features(z, n)
    assert not np.any(columns["Z valence"])
    assert not np.any(columns["N valence"])
    assert np.all(features(z + 1, n + 1)["Z valence"] == 1)


def test_features_of_lead_208_and_a_neighbour():
    values = features(np.array([82, 81]), np.array([126, 130]))
    assert [v.tolist() for name, v in values.items() if "parity" in name] == [[0, 1], [0, 0]]
    assert values["Z valence"].tolist() == [0, 1]
    assert values["N valence"].tolist() == [0, 4]
    assert values["Z shell"].tolist() == [6, 5]
    assert values["Z filled"].tolist() == [0, 31 / 32]
    assert values["asymmetry"].tolist() == [44 / 208, 49 / 211]


# Training


@pytest.fixture(scope="module")
def problem():
    return training.Problem.pose(TRAIN, Formula.fit(TRAIN))


def trained(problem, face, **changes):
    settings = dataclasses.replace(SMALL, **changes)
    inputs, targets = problem.inputs(TRAIN), problem.targets(TRAIN)
    return training.train(face, inputs, targets, settings, seed=0)


def test_problem_is_standardised_float32(problem):
    inputs, targets = problem.inputs(TRAIN), problem.targets(TRAIN)
    assert inputs.dtype == targets.dtype == jnp.float32
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(inputs.std(axis=0), 1, atol=1e-5)
    assert float(targets.std()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["haiku", "flax"])
@pytest.mark.slow
def test_training_learns_and_repeats(problem, name):
    face = training.haiku_face(SMALL.hidden_dims)
    if name == "flax":
        model = compat.MLP(hidden_dims=SMALL.hidden_dims, param_dtype=jnp.float32)
        face = training.Face(model.init, model.apply, str)
    weights = trained(problem, face)
    jax.tree.map(np.testing.assert_array_equal, weights, trained(problem, face))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(weights))
    error = training.rms(problem.mass_excess(face, weights, TRAIN) - TRAIN.mass_excess)
    assert error < 0.6 * problem.scale


def test_training_reports_every_step(problem):
    face = training.haiku_face(SMALL.hidden_dims)
    inputs, targets = problem.inputs(TRAIN), problem.targets(TRAIN)
    calls = []
    training.train(face, inputs, targets, SMALL, seed=0, advance=lambda *call: calls.append(call))
    assert sum(steps for steps, _ in calls) == SMALL.steps
    # Untrained, the error is 1.
    assert all(0.1 < error < 0.8 for _, error in calls)


def test_members_differ_and_train_apart(problem):
    face = training.haiku_face(SMALL.hidden_dims)
    inputs = problem.inputs(TRAIN)
    weights = trained(problem, face)
    first, second = training.predict(face, weights, inputs)
    assert not np.allclose(first, second, atol=0.01)
    mean = problem.mass_excess(face, weights, TRAIN) - problem.formula.mass_excess(TRAIN)
    np.testing.assert_allclose(mean, problem.scale * (first + second) / 2, atol=1e-5)


# Report


def lines_of(text):
    return {line.split()[0]: line for line in text.splitlines() if line[:1].isupper()}


def test_report_compares_on_the_same_nuclides():
    formula = Formula.fit(TRAIN)
    table = nuclides.read("MAJA88")
    on_theirs = TEST.among(table)
    # Exact where MAJA88 predicts, and 10 MeV off elsewhere.
    predicted = TEST.mass_excess + np.where(on_theirs, 0.0, 10.0)
    lines = lines_of(report.report(TEST, formula, {"Haiku": predicted}))
    assert re.search(r"1988 +203 +1\.232 +0\.000$", lines["MAJA88"])
    assert "beats the MLP" in lines["DUZU"]


def test_report_says_what_beats_the_mlp_and_what_postdates_the_data():
    formula = Formula.fit(TRAIN)
    lines = lines_of(report.report(TEST, formula, {"Haiku": TEST.mass_excess + 0.2}))
    assert [name for name, line in lines.items() if "beats the MLP" in line] == ["BR2013"]
    assert lines["BR2013"].endswith("beats the MLP (Haiku), postdates the test data")
    assert lines["HFB26"].endswith("postdates the test data, fitted to AME2012")
    assert lines["FRDM95"].split() == ["FRDM95", "1995", "219", "0.765", "0.200"]


def test_report_names_the_faces_that_are_beaten():
    predictions = {"Haiku": TEST.mass_excess + 0.2, "Flax": TEST.mass_excess + 0.5}
    lines = lines_of(report.report(TEST, Formula.fit(TRAIN), predictions))
    assert lines["BR2013"].endswith("beats the MLP (Haiku, Flax), postdates the test data")
    assert "beats the MLP (Flax)" in lines["WS32010"]
    assert "beats the MLP" not in lines["HFB26"]


# Chart


@pytest.fixture
def drawn(monkeypatch):
    """Returns the axes of the chart of errors in MeV on training and test nuclides."""

    def drawn(of_train, of_test):
        figures = []
        monkeypatch.setattr(chart.Figure, "savefig", lambda self, *_, **__: figures.append(self))
        predictions = TRAIN.mass_excess + of_train, TEST.mass_excess + of_test
        chart.draw("chart.png", (TRAIN, TEST), Formula.fit(TRAIN), predictions)
        return figures[0].axes[:2]

    return drawn


def test_chart_shows_each_residual_at_its_nuclide(drawn):
    formula = Formula.fit(TRAIN)
    upper, lower = drawn(0.25, -0.5)
    assert (upper.get_title("left"), lower.get_title("left")) == (
        "Semi-empirical mass formula",
        "Formula and MLP",
    )
    for axes, limit, of_train, of_test in [
        (upper, 10, *(formula.mass_excess(some) - some.mass_excess for some in (TRAIN, TEST))),
        (lower, 1, np.full(len(TRAIN), 0.25), np.full(len(TEST), -0.5)),
    ]:
        mesh, squares = axes.collections
        assert mesh.get_clim() == (-limit, limit)
        # Cell and colour of each nuclide, and no other cell has one.
        corners, values = mesh.get_coordinates(), mesh.get_array()
        for some, residuals in ((TRAIN, of_train), (TEST, of_test)):
            np.testing.assert_allclose(values[some.z, some.n], residuals, atol=1e-12)
            np.testing.assert_array_equal(corners[some.z, some.n, 0], some.n - 0.5)
            np.testing.assert_array_equal(corners[some.z, some.n, 1], some.z - 0.5)
            np.testing.assert_array_equal(corners[some.z + 1, some.n + 1, 0], some.n + 0.5)
        assert np.isfinite(values).sum() == len(TRAIN) + len(TEST)
        boxes = [path.get_extents() for path in squares.get_paths()]
        assert {(box.x0 + 0.5, box.y0 + 0.5, box.x1 - 0.5, box.y1 - 0.5) for box in boxes} == {
            (n, z, n, z) for z, n in TEST.numbers()
        }
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == [
            f"{name}: {len(residuals)} nuclides, rms {training.rms(residuals):.2f} MeV"
            for name, residuals in (("AME2003, train", of_train), ("AME2012, test", of_test))
        ]
        assert axes.get_xlim()[0] < TRAIN.n.min() < TRAIN.n.max() < axes.get_xlim()[1]
        assert axes.get_ylim()[0] < TRAIN.z.min() < TRAIN.z.max() < axes.get_ylim()[1]


def test_chart_marks_the_magic_numbers_as_far_as_there_are_nuclides(drawn):
    axes, _ = drawn(0, 0)
    lines = {tuple(map(tuple, line.get_xydata().tolist())) for line in axes.lines}
    both = TRAIN.numbers() + TEST.numbers()
    expected = set()
    for magic in (8, 20, 28, 50, 82):
        n = [n for z, n in both if z == magic]
        expected.add(((min(n) - 3, magic), (max(n) + 3, magic)))
    for magic in (8, 20, 28, 50, 82, 126):
        z = [z for z, n in both if n == magic]
        expected.add(((magic, min(z) - 3), (magic, max(z) + 3)))
    assert lines == expected
    names = [text.get_text() for text in axes.texts]
    assert sorted(names) == sorted(
        [f"$Z={m}$" for m in (8, 20, 28, 50, 82)] + [f"$N={m}$" for m in (8, 20, 28, 50, 82, 126)]
    )
