"""A survey whose variants of a layer travel through the dense layers that follow, to the model's logits."""

import numpy as np
import pytest
import torch
from by_threshold import features, silenced
from conftest import CPU, make_llama, pruning_options, uncorrected
from tiny_families import make_family

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
from olica.sources.dense_model import DenseModel, StreamedModel, open_dense_model
from olica.sources.locate import locate

IDS = torch.randint(3, 319, (5, 23), generator=torch.Generator().manual_seed(0))
SAMPLES, LAYERS, CHANNELS, GROUPS = 3, 3, 60, 1
FAMILIES = ["llama", "olmo2", "gemma2", "granite", "phi3"]


class Killed(BaseException):
    """Stands for a signal that no code handles."""


class Trying(TravellingSurvey):
    """Tries every layer with its last channels only, and with its last group of heads only; keeps the logits."""

    reads_plan = False
    samples, most_variants = SAMPLES, 2

    def needs(self, index, layers):
        return frozenset({diagonal("mlp_input")})

    def workspace(self, sizes, shape):
        return 0

    def __call__(self, layer, shape):
        return {"norms": layer.moments[diagonal("mlp_input")]}

    def variants(self, layer, shape):
        """The last units have the highest scores."""
        sizes = layer.sizes
        thinner = LayerShape(0, 0, sizes.head_dim, CHANNELS)
        fewer = LayerShape(0, 0, sizes.head_dim, sizes.intermediate_size, kv_heads=GROUPS)
        mlp = ThinnedMLP(needs()(lambda layer: torch.arange(sizes.intermediate_size)))
        heads = RemovedGroups(needs()(lambda layer: torch.arange(sizes.num_kv_heads)))
        return [(thinner, mlp(layer, thinner)), (fewer, heads(layer, fewer))]

    def complete(self, findings, logits):
        dense = logits(None, None)
        return [
            found | {"dense": dense, "thinner": logits(index, 0), "fewer": logits(index, 1)}
            for index, found in enumerate(findings)
        ]


def work_of(dense: DenseModel) -> Work:
    method = uncorrected("magnitude")
    method = type(method)(method.stream, Trying(), method.allocate, method.passes)
    return Work(dense, IDS, method, pruning_options(batch_size=BatchSize(2)))


@torch.no_grad()
def expected_of(model) -> list[dict[str, torch.Tensor]]:
    """Logits of the dense model, and of those whose layer lacks channels or heads, by hooks that silence them."""
    config, ids, found = model.config, IDS[:SAMPLES], []
    widths = {"o_proj": config.num_attention_heads * config.head_dim, "down_proj": config.intermediate_size}
    zeros = [{name: np.zeros(width) for name, width in widths.items()}] * LAYERS
    nothing = dict.fromkeys(widths, np.array([], dtype=int))
    lost = {
        "thinner": {"down_proj": np.arange(config.intermediate_size - CHANNELS)},
        "fewer": {"o_proj": features(np.arange(config.num_key_value_heads - GROUPS), config)},
    }
    for layer in range(LAYERS):
        logits = {"dense": model(ids).logits}
        for variant, indices in lost.items():
            gone = [nothing | (indices if index == layer else {}) for index in range(LAYERS)]
            with silenced(model, gone, zeros):
                logits[variant] = model(ids).logits
        found.append(logits)
    return found


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_those_of_the_dense_model_with_that_layer_replaced(family, streamed, tmp_path):
    model = make_family(family)
    expected = expected_of(model)
    if streamed:
        model.save_pretrained(tmp_path / "dense")
        dense = open_dense_model(locate(str(tmp_path / "dense")))
        assert isinstance(dense, StreamedModel)
    else:
        dense = DenseModel(model)
    findings = survey_layers(work_of(dense), None, SurveyProgress())
    for found, logits in zip(findings, expected, strict=True):
        assert found["dense"].shape == (SAMPLES, 23, 319) and found["norms"].shape == (63,)
        for name in logits:
            torch.testing.assert_close(found[name], logits[name], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(found["thinner"], found["dense"], rtol=1e-2, atol=1e-2)
        assert not torch.allclose(found["fewer"], found["dense"], rtol=1e-2, atol=1e-2)
    if streamed:
        assert all(parameter.is_meta for parameter in dense.model.parameters()), "the weights are given back"
    else:
        torch.testing.assert_close(dense.model(IDS[:SAMPLES]).logits, expected[0]["dense"])


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
