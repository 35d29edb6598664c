"""A suite of two cells on the smallest recall recipe, for what does not need the smoke suite."""

import pytest

SUITE = """
description: two tiny cells
experiments:
  tiny:
    recipe: recall/smoke
    set:
      - task.dataset.train=[[16,2,64],[24,2,64]]
      - task.dataset.test=[[16,2,20],[24,2,20]]
      - train.steps=4
      - train.eval_every=2
      - train.save_every=2
      - train.log_every=2
    models: [recall_gatedfwa_d32, recall_swa_d32]
    seeds: [0, 1]
    stacked: true
    measure: [scores, curve]
    published: {recall_swa_d32: 0.5}
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(SUITE)
    return str(path)
