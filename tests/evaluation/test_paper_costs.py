"""The paper's costs beside ours."""

import pytest

from enat_jax.evaluation import paper_costs
from enat_jax.models import vqgan
from enat_jax.schedules import costs

ROWS = {(row["model"], row["num_steps"]): row for row in paper_costs.rows()}


def test_the_ablations_agree_to_a_percent_or_two():
    small = ROWS["ENAT-S", 8]
    assert (small["paper"], small["last_digit"]) == (22.6e9, 0.1e9)
    assert small["recount"] == costs.paper_cost(costs.Dims(366, 15, 1), 8)
    assert small["same_digits"] and small["difference"] == pytest.approx(-0.0005, abs=3e-4)
    nat = ROWS["NAT, 8 layers", 8]
    assert not nat["same_digits"] and nat["difference"] == pytest.approx(-0.0137, abs=1e-3)


def test_the_systems_include_the_image_decoder_and_agree_in_their_one_digit():
    decoder = costs.image_decoder_cost(vqgan.VQGAN(), 16, 16)
    large = ROWS["ENAT-L", 4]
    assert large["recount"] == costs.paper_cost(costs.Dims(1024, 22, 2), 4) + decoder
    assert large["difference"] == pytest.approx(0.208, abs=1e-3)
    systems = [row for row in ROWS.values() if row["image_decoder"]]
    assert len(systems) == 5 and all(row["same_digits"] for row in systems)


def test_what_is_computed_here_is_less_than_the_paper_counts():
    assert all(row["exact"] < row["recount"] for row in ROWS.values())
    dims = costs.Dims(288, mixed_layers=8, reuse=False)
    assert ROWS["NAT, 8 layers", 8]["exact"] == costs.exact_sampling_cost(dims, 8)


def test_the_table_has_a_row_a_model():
    text = paper_costs.markdown(paper_costs.rows())
    assert "| ENAT-S | 6 | 8 | 22.6 G | 22.59 G | -0.1% | yes | 21.12 G |" in text
    assert "| ENAT-L | 2 | 8 | 0.3 T | 347.34 G | +15.8% | yes | 334.65 G |" in text
