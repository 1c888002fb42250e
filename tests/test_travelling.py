"""A survey whose variants of a layer travel through the dense layers that follow, to the model's logits."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from by_threshold import features, silenced
from conftest import CPU, make_llama, opened, pruning_options, uncorrected
from tiny_families import make_family
from tiny_run import Killed

from olica.machine import BatchSize
from olica.methods.feed_forward import ThinnedMLP
from olica.methods.heads import RemovedGroups
from olica.methods.moments import diagonal, needs
from olica.methods.recipe import TravellingSurvey
from olica.model.configuration_olica import LayerShape
from olica.outputs import run_progress
from olica.outputs.survey_store import StoredSurvey
from olica.pruning.options import Work
from olica.pruning.progress import SurveyProgress
from olica.pruning.survey import survey_layers
from olica.sources.dense_model import DenseModel, StreamedModel

IDS = torch.randint(3, 319, (7, 23), generator=torch.Generator().manual_seed(0))
SAMPLES, STRIDE, LAYERS, CHANNELS, GROUPS = 3, 4, 3, 60, 1
ROWS = [0, 2, 4]  # as far apart as they can be
FAMILIES = ["llama", "olmo2", "gemma2", "granite", "phi3"]


class Trying(TravellingSurvey):
    """Tries every layer with its last channels only, and with its last group of heads only; keeps the logits.

    Attributes:
        compared: (logits of the dense model, those of a changed one) in the order in which they came.
    """

    stride, most_variants = STRIDE, 2

    def __init__(self, group: int = 1):
        self.group, self.compared = group, []

    def samples(self, calibration):
        return min(SAMPLES, calibration)

    def groups(self, layers):
        return [range(first, min(first + self.group, layers)) for first in range(0, layers, self.group)]

    def needs(self, index, layers):
        return frozenset({diagonal("mlp_input")})

    def workspace(self, sizes, shape):
        return 0

    def __call__(self, layer, shape):
        return {"norms": layer.moments[diagonal("mlp_input")]}

    def variants(self, sizes):
        """The last units have the highest scores."""
        thinner = LayerShape(0, 0, sizes.head_dim, CHANNELS)
        fewer = LayerShape(0, 0, sizes.head_dim, sizes.intermediate_size, kv_heads=GROUPS)
        mlp = ThinnedMLP(needs()(lambda layer: torch.arange(sizes.intermediate_size)))
        heads = RemovedGroups(needs()(lambda layer: torch.arange(sizes.num_kv_heads)))
        return [(thinner, mlp), (fewer, heads)]

    def compare(self, dense, changed):
        self.compared += [(dense, logits) for logits in changed]
        return changed.double().square().mean((1, 2)).tolist()

    def complete(self, findings, compared):
        """Finds the means of what was compared, under the names of the variants."""
        names = {0: "thinner", 1: "fewer"}
        completed = [dict(found) for found in findings]
        for (first, number), mean in compared.items():
            completed[first][names[number]] = torch.tensor(mean, dtype=torch.float64)
        return completed


class ReadingHalf(Trying):
    """Reads every other sample, the same number of which its variants see."""

    def reads(self, calibration):
        return (calibration + 1) // 2


def work_of(dense: DenseModel, survey: Trying | None = None, ids: torch.Tensor = IDS) -> Work:
    method = uncorrected("magnitude")
    method = type(method)(method.stream, survey or Trying(), method.allocate, method.passes)
    return Work(dense, ids, method, pruning_options(batch_size=BatchSize(2)))


@torch.no_grad()
def expected_of(model, group: int = 1) -> dict[tuple[int, str] | None, torch.Tensor]:
    """Logits at every STRIDE-th token of the dense model (None), and of those of which one layer, or all of a group,
    lacks channels or heads, by hooks that silence them."""
    config, ids = model.config, IDS[ROWS]
    widths = {"o_proj": config.num_attention_heads * config.head_dim, "down_proj": config.intermediate_size}
    zeros = [{name: np.zeros(width) for name, width in widths.items()}] * LAYERS
    nothing = dict.fromkeys(widths, np.array([], dtype=int))
    lost = {
        "thinner": {"down_proj": np.arange(config.intermediate_size - CHANNELS)},
        "fewer": {"o_proj": features(np.arange(config.num_key_value_heads - GROUPS), config)},
    }
    found = {None: model(ids).logits[:, STRIDE - 1 :: STRIDE]}
    for first in range(0, LAYERS, group):
        for variant, indices in lost.items():
            gone = [nothing | (indices if first <= index < first + group else {}) for index in range(LAYERS)]
            with silenced(model, gone, zeros):
                found[first, variant] = model(ids).logits[:, STRIDE - 1 :: STRIDE]
    return found


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", [1, 2])
def test_the_logits_are_those_of_the_dense_model_with_those_layers_replaced(family, streamed, group, tmp_path):
    model = make_family(family)
    expected = expected_of(model, group)
    if streamed:
        model.save_pretrained(tmp_path / "dense")
        dense = opened(tmp_path / "dense")
        assert isinstance(dense, StreamedModel)
    else:
        dense = DenseModel(model)
    survey = Trying(group)
    findings = survey_layers(work_of(dense, survey), None, SurveyProgress())
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)
    variants = [key for key in expected if key]
    # Sample by sample, all variants of each.
    for (found_dense, found), (row, key) in zip(survey.compared, product(range(SAMPLES), variants), strict=True):
        assert found.shape == (23 // STRIDE, 319)
        close(found_dense, expected[None][row])
        close(found, expected[key][row])
        assert not torch.allclose(found, found_dense, rtol=1e-2, atol=1e-2)
    for first, variant in variants:
        mean = expected[first, variant].double().square().mean((1, 2)).mean()
        close(findings[first][variant], mean)
    assert all(found["norms"].shape == (63,) for found in findings)
    if streamed:
        assert all(parameter.is_meta for parameter in dense.model.parameters()), "the weights are given back"
    else:
        close(model(IDS[ROWS]).logits[:, STRIDE - 1 :: STRIDE], expected[None])


def test_a_survey_that_reads_half_of_the_text_finds_what_one_of_that_half_finds():
    """Bit for bit; the samples are as far apart as they can be."""
    model = make_llama()
    found = survey_layers(work_of(DenseModel(model), ReadingHalf()), None, SurveyProgress())
    expected = survey_layers(work_of(DenseModel(model), ids=IDS[[0, 1, 3, 5]]), None, SurveyProgress())
    whole = survey_layers(work_of(DenseModel(model)), None, SurveyProgress())
    for one, same, other in zip(found, expected, whole, strict=True):
        assert one.keys() == same.keys() and all(torch.equal(one[name], same[name]) for name in one)
        assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_survey_that_travels_goes_on_with_equal_bits(monkeypatch, tmp_path, layers):
    model = make_llama(num_key_value_heads=2, head_dim=16)
    expected = survey_layers(work_of(DenseModel(model)), None, SurveyProgress())
    monkeypatch.setattr(run_progress, "SAVED_EVERY", -1.0)
    save = StoredSurvey.save

    def dying(self, surveyed):
        save(self, surveyed)
        if len(surveyed.findings) == layers:
            raise Killed

    def survey() -> tuple[list, int]:
        with StoredSurvey.locked(tmp_path, {"of": "a test"}, BatchSize(2)) as progress:
            return survey_layers(work_of(DenseModel(model)), None, progress), progress.layers_before

    with monkeypatch.context() as patched:
        patched.setattr(StoredSurvey, "save", dying)
        with pytest.raises(Killed):
            survey()
    for again, before in ((survey(), layers), (survey(), LAYERS)):
        findings, taken_up = again
        assert taken_up == before
        for found, wanted in zip(findings, expected, strict=True):
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert model.device == CPU and not list(tmp_path.rglob("states*"))
