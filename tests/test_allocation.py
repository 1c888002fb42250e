import pytest
import torch
from conftest import allocate, as_method, make_llama
from transformers import Gemma3TextConfig, LlamaConfig

from olica.errors import UsageError
from olica.jobs import plan_before_survey
from olica.methods.olica import OlicaParameters
from olica.methods.recipes import RECIPES
from olica.methods.rounding import attention_parameters, factor_rank, round_shape
from olica.methods.shares import (
    FEWEST_ALONE,
    LEAST_ALONE,
    MOST_ALONE,
    RELEASED_SPLIT,
    Corrections,
    grouped_sparsities,
    kept_by_code,
    paper_sparsities,
    released_sparsities,
    uniform_shape,
)
from olica.methods.sizes import Budget, Sizes, describe_plan
from olica.methods.threshold import GlobalThreshold
from olica.model.configuration_olica import LayerShape
from olica.model.skeleton import pruned_skeleton
from olica.sources.configuration import count_dense_parameters
from olica.sources.locate import Location

LLAMA_7B = LlamaConfig()  # the defaults of the class are LLaMA-7B
# The recipes whose shares a rule fixes.
FIXED = [name for name, recipe in RECIPES.items() if "mlp_num" in recipe.parameter_names]


def layers_of(config) -> list[Sizes]:
    return [Sizes.of(config)] * config.num_hidden_layers


def lost_by_layers(sizes: list[Sizes], shares) -> float:
    """Parameters that all layers lose together."""
    return len(sizes) * sum(getattr(sizes[0], name) * share for name, share in vars(shares).items())


def dense_parameters(config, part: str = "total") -> int:
    return count_dense_parameters(Location("a model in memory", ".", "--base_model"), config)[part]


@pytest.mark.parametrize(
    ("sparsity", "rank", "v_head_dim", "intermediate", "billions"),
    # What the released code's formulas give on LLaMA-7B, without corrections.
    [(0.20, 1229, 116, 8946, 5.3975), (0.25, 1024, 112, 8431, 5.0540), (0.33, 697, 107, 7606, 4.5162),
     (0.40, 410, 103, 6884, 4.0483), (0.50, 512, 96, 5171, 3.3695)],
)  # fmt: skip
def test_llama_7b_gets_the_sizes_of_the_released_code(sparsity, rank, v_head_dim, intermediate, billions):
    total = dense_parameters(LLAMA_7B)
    assert total == 6_738_415_616
    plan, _ = allocate("olica", LLAMA_7B, total, sparsity, 3.0)
    assert plan == [LayerShape(rank, rank, v_head_dim, intermediate)] * 32
    assert pruned_skeleton(LLAMA_7B, plan).num_parameters() / 1e9 == pytest.approx(billions, abs=5e-5)


def test_the_released_rule_changes_at_its_split():
    assert RELEASED_SPLIT == 0.4
    sizes, total = layers_of(LLAMA_7B), dense_parameters(LLAMA_7B)
    below, above = (released_sparsities(sizes, Budget(total, sparsity), 2.0) for sparsity in (0.4, 0.41))
    assert below.query == below.key == pytest.approx(0.8)
    assert above.query == above.key == pytest.approx(2 * above.value_output)
    for shares, target in ((below, 0.4), (above, 0.41)):
        assert lost_by_layers(sizes, shares) == pytest.approx(target * total)


def test_the_papers_rule_scales_the_target_to_what_is_prunable():
    sizes = [Sizes(hidden_size=2, num_heads=1, num_kv_heads=1, head_dim=5, intermediate_size=20)] * 5
    assert (sizes[0].query, sizes[0].key, sizes[0].value_output, sizes[0].feed_forward) == (10, 10, 20, 120)
    shares = paper_sparsities(sizes, Budget(1000, 0.2), 3.0)
    assert shares.query == shares.key == pytest.approx(2 * 0.2 * 1000 / 800)
    assert shares.value_output == pytest.approx(shares.query / 4)
    assert 5 * (20 * shares.query + 20 * shares.value_output + 120 * shares.feed_forward) == pytest.approx(200)


SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
LLAMA3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
)
GEMMA3_270M = Gemma3TextConfig(
    vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256,
)  # fmt: skip


@pytest.mark.parametrize(
    ("sparsity", "query", "key"), [(0.01, 0, 0), (0.1, 0.6, 0), (0.2, 0.6, 0), (0.3, 0.7, 0.3), (0.4, 0.8, 0.8)]
)
def test_grouped_queries_lose_for_the_keys_while_they_can(sparsity, query, key):
    sizes, budget = layers_of(SMOLLM2), Budget(dense_parameters(SMOLLM2), sparsity)
    shares, released = grouped_sparsities(sizes, budget, 3.0), released_sparsities(sizes, budget, 3.0)
    assert (shares.query, shares.key) == (pytest.approx(query), pytest.approx(key))
    assert shares.value_output == released.value_output and shares.feed_forward >= 0
    assert lost_by_layers(sizes, shares) == pytest.approx(sparsity * budget.whole)
    # Where no limit is in the way, the queries lose just what both lost together.
    assert (shares.feed_forward == pytest.approx(released.feed_forward)) == (sparsity > 0.2)


def test_a_hair_too_much_makes_no_factors_of_the_keys():
    config = make_llama(num_key_value_heads=2).config  # half as many as query heads: q loses three times the sparsity
    plan, shares = allocate("olica-grouped", config, dense_parameters(config), MOST_ALONE / 3, 3.0)
    assert plan[0].k_rank == 0 and shares.query == pytest.approx(MOST_ALONE)


@pytest.mark.parametrize("config", [SMOLLM2, LLAMA3_8B, GEMMA3_270M], ids=["smollm2", "llama3-8b", "gemma3-270m"])
def test_keys_take_over_from_queries_without_a_jump(config):
    sizes, whole = layers_of(config), dense_parameters(config, "decoder_layers")
    ratio, before = sizes[0].key / sizes[0].query, None
    for thousandths in range(1, 400):
        sparsity = thousandths / 1000
        shares = grouped_sparsities(sizes, Budget(whole, sparsity), 3.0)
        if shares.query < LEAST_ALONE:
            assert before is None and shares.key == 0, "only where there is too little to lose"
            assert (shares.query == 0) != (shares.feed_forward == pytest.approx(0))
            assert shares.query == 0 or shares.query >= FEWEST_ALONE
            continue
        if before:
            steps = [abs(share - old) for share, old in zip(vars(shares).values(), vars(before).values(), strict=True)]
            assert max(steps) < 0.002 * (1 + 1 / ratio) + 1e-9  # what q loses less of, k loses 1 / ratio times as much
        before = shares
        lost = shares.query + ratio * shares.key
        assert lost == pytest.approx(max(LEAST_ALONE, 2 * sparsity * (1 + ratio)))
        assert shares.key == 0 or shares.query >= MOST_ALONE
        assert 2 * sparsity < MOST_ALONE or shares.key == pytest.approx(shares.query)


def test_sizes_that_jump_are_named():
    sizes, total = layers_of(SMOLLM2), dense_parameters(SMOLLM2)

    def jumps(recipe: str, sparsity: float) -> list[str]:
        return as_method(recipe, mlp_num=0).allocate.jumps(sizes, Budget(total, sparsity))

    assert jumps("olica-grouped", 0.1) == jumps("olica", 0.2) == []
    (words,) = jumps("olica-grouped", 0.01)
    assert words == "at --sparsity 0.02 the rank of q is 214, here 576"
    (words,) = jumps("olica-grouped", 0.26)  # next, queries lose MOST_ALONE and keys what is missing
    assert words.startswith("at --sparsity 0.27 the rank of k is ") and words.endswith(", here 192")
    (words,) = jumps("olica", RELEASED_SPLIT)
    assert words == "at --sparsity 0.41 the rank of q is 111, here 58, the rank of k is 56, here 29"
    assert jumps("olica", 0.0)[0].startswith("at --sparsity 0.01 the rank of q is 283, here 576")
    (note,) = as_method("olica-grouped", mlp_num=0).allocate.notes(sizes, Budget(total, 0.01))
    assert note.startswith("at --sparsity 0.02 the rank of q is 214, here 576: between the two") and "jump" in note
    rounded = as_method("olica", mlp_num=0).allocate.jumps(sizes, Budget(total, RELEASED_SPLIT, round_to=64))
    assert rounded == [words], "what jumps are the exact sizes"


def test_where_attention_is_wide_the_mlps_never_grow_for_it():
    # Of a layer's 720 parameters 200 are the queries', 100 the keys', 300 the values' and outputs', 120 the MLP's.
    sizes = [Sizes(hidden_size=10, num_heads=2, num_kv_heads=1, head_dim=10, intermediate_size=4)] * 2
    shares = grouped_sparsities(sizes, Budget(2000, 0.1), 3.0)
    # They are to lose 100, of which 300 * 0.05 are lost by values and outputs.
    assert shares.query == pytest.approx(85 / 200) and (shares.key, shares.feed_forward) == (0, pytest.approx(0))
    assert shares.feed_forward >= 0


def test_ungrouped_heads_get_the_released_shares():
    sizes, total = layers_of(LLAMA_7B), dense_parameters(LLAMA_7B)
    for sparsity in (0.02, 0.1, 0.2, 0.33, 0.5):
        budget = Budget(total, sparsity)
        assert grouped_sparsities(sizes, budget, 3.0) == released_sparsities(sizes, budget, 3.0)


def test_factor_rank_breaks_even():
    assert factor_rank(576, 576, 0.4) == 173
    rank = factor_rank(192, 576, 0.4)  # grouped keys: 3 heads of 64
    assert rank * (192 + 576) >= 0.6 * 192 * 576 > (rank - 1) * (192 + 576)
    assert factor_rank(64, 64, 0.0) == 0, "a pair as large as the matrix is not worth having"


def test_sparsity_zero_leaves_every_size():
    config = make_llama().config
    plan, _ = allocate("olica", config, dense_parameters(config), 0.0, 3.0)
    assert plan == [LayerShape(0, 0, 16, 176)] * 3


@pytest.mark.parametrize(
    ("sparsity", "shape"),
    # By hand: q loses 2 s of 576 x 576 and k of 192 x 576 (above 0.4: 1.5 s), heads of 64 lose s / 2.
    [(0.1, LayerShape(231, 116, 61, 1341)), (0.2, LayerShape(173, 87, 58, 1146)), (0.5, LayerShape(72, 36, 48, 495))],
)
def test_olica_gives_grouped_heads_the_shares_of_plain_ones(sparsity, shape):
    plan, shares = allocate("olica", SMOLLM2, dense_parameters(SMOLLM2), sparsity, 3.0)
    assert shares.query == shares.key == pytest.approx(2 * sparsity if sparsity <= RELEASED_SPLIT else 1.5 * sparsity)
    assert plan == [shape] * 30


@pytest.mark.parametrize("recipe", FIXED)
@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.33])
def test_a_sparsity_of_the_layers_is_theirs(recipe, sparsity):
    dense = dense_parameters(SMOLLM2, "decoder_layers")
    plan, _ = allocate(recipe, SMOLLM2, dense, sparsity, 3.0)
    left = sum(p.numel() for p in pruned_skeleton(SMOLLM2, plan).model.layers.parameters())
    assert 1 - left / dense == pytest.approx(sparsity, abs=0.006)  # a size is a whole number


def layer_parameters(config, shape: LayerShape) -> int:
    """Weights of the matrices of a layer, from the modules that it gets."""
    shallow = LlamaConfig(**config.to_dict() | {"num_hidden_layers": 1})
    (layer,) = pruned_skeleton(shallow, [shape]).model.layers
    return sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)


@pytest.mark.parametrize("round_to", [8, 16, 32, 64])
@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.33, 0.5])
@pytest.mark.parametrize("config", [LLAMA_7B, SMOLLM2, LLAMA3_8B], ids=["llama-7b", "smollm2", "llama3-8b"])
def test_rounded_sizes_are_multiples_and_keep_the_target(config, sparsity, round_to):
    total = dense_parameters(config)
    (exact, *_), shares = allocate("olica", config, total, sparsity, 3.0)
    (shape, *rest), same_shares = allocate("olica", config, total, sparsity, 3.0, round_to)
    assert rest == [shape] * (config.num_hidden_layers - 1) and same_shares == shares
    assert all(size % round_to == 0 for size in shape.to_dict().values())
    for name in ("q_rank", "k_rank", "v_head_dim"):
        size = getattr(exact, name)
        assert abs(getattr(shape, name) - size) <= max(round_to / 2, round_to - size), name
    assert (shape.q_rank > 0) == (exact.q_rank > 0) and shape.intermediate_size < config.intermediate_size
    off = layer_parameters(config, shape) - layer_parameters(config, exact)
    assert abs(off) <= 3 * config.hidden_size * round_to / 2


@pytest.mark.parametrize("sparsity", [0.0, 0.07, 0.2, 0.5])
def test_rounding_to_1_changes_nothing(sparsity):
    for config in (LLAMA_7B, SMOLLM2, make_llama(num_key_value_heads=2).config):
        sizes, total = layers_of(config), dense_parameters(config)
        exact = uniform_shape(sizes[0], released_sparsities(sizes, Budget(total, sparsity), 3.0), kept_by_code)
        assert round_shape(exact, sizes[0], 1) == exact
        assert allocate("olica", config, total, sparsity, 3.0, 1)[0][0] == exact


def test_rounding_leaves_dense_what_is_dense_or_would_not_shrink():
    layer = Sizes.of(make_llama(intermediate_size=177).config)  # four heads of 16 in 64: a rank breaks even at 32
    assert round_shape(LayerShape(0, 0, 16, 177), layer, 8) == LayerShape(0, 0, 16, 177)
    shape = round_shape(LayerShape(30, 27, 15, 100), layer, 8)
    assert (shape.q_rank, shape.k_rank, shape.v_head_dim) == (0, 24, 16)
    grown = 64 * (64 - 30 * 2) + 64 * (24 - 27) * 2 + 2 * 64 * 4  # parameters of q, of k, of v and o
    assert shape.intermediate_size == 8 * round((100 - grown / (3 * 64)) / 8)
    assert round_shape(LayerShape(3, 3, 2, 100), layer, 16) == LayerShape(16, 16, 16, 48)


def test_attention_parameters_are_those_of_the_modules():
    config = make_llama(num_key_value_heads=2).config
    for shape in (LayerShape(0, 0, 16, 100), LayerShape(20, 0, 9, 100), LayerShape(20, 10, 9, 100)):
        assert attention_parameters(Sizes.of(config), shape) == layer_parameters(config, shape) - 3 * 64 * 100


@pytest.mark.parametrize("round_to", [-8, 0, 177])
def test_rounding_that_no_mlp_allows_is_refused(round_to):
    config = make_llama().config
    with pytest.raises(UsageError, match=rf"--round_to {round_to} is outside 1 to 176, the channels"):
        allocate("olica", config, dense_parameters(config), 0.2, 3.0, round_to)


def test_where_no_multiple_is_small_enough_heads_stay_whole():
    """Heads have a width of 16: at multiples of 32 only channels and ranks are left to go."""
    config = make_llama().config
    (shape, *_), _ = allocate("olica", config, dense_parameters(config), 0.2, 3.0, 32)
    assert shape.v_head_dim == 16 and shape.intermediate_size % 32 == 0 and shape.q_rank in (0, 32)


def test_a_sparsity_that_rounding_makes_impossible_names_it():
    config = make_llama().config
    total = dense_parameters(config)
    allocate("olica", config, total, 0.65, 3.0)
    words = r"--sparsity 0\.65 .* --round_to 16: an MLP would keep no channel; the largest possible is 0\.\d+$"
    with pytest.raises(UsageError, match=words) as caught:
        allocate("olica", config, total, 0.65, 3.0, 16)
    allocate("olica", config, total, float(str(caught.value).rsplit(" ", 1)[1]), 3.0, 16)


def test_an_impossible_sparsity_names_the_largest_possible():
    config = make_llama().config
    total = dense_parameters(config)
    words = r"--sparsity 0\.95 .*: the \w+( \w+)? would have to lose .*largest possible is (0\.\d+)"
    with pytest.raises(UsageError, match=words) as caught:
        allocate("olica", config, total, 0.95, 3.0)
    largest = float(str(caught.value).rsplit(" ", 1)[1])
    allocate("olica", config, total, largest, 3.0)
    with pytest.raises(UsageError):
        allocate("olica", config, total, largest + 0.001, 3.0)


@pytest.mark.parametrize("recipe", ["magnitude", "flap"])
def test_more_than_all_units_but_one_of_each_kind_is_refused(recipe):
    """By hand: the tiny LLaMA's layers keep one head, D (4 d) weights, and one channel, 3 D, of 18432 + 33792."""
    config = make_llama(num_key_value_heads=4).config
    total, removable = dense_parameters(config), 3 * (3 * 4 * 64 * 16 + 175 * 3 * 64)
    added = 3 * 2 * 64 if recipe == "flap" else 0  # biases of o_proj and down_proj
    sizes, row = layers_of(config), RECIPES[recipe]
    most = (removable - added) / total
    assert plan_before_survey(row, as_method(recipe), sizes, Budget(total, most - 1e-6)) is None
    words = rf"--sparsity {most + 0.01:g} .*--recipe {recipe}: every layer would be left .* possible is (0\.\d+)$"
    with pytest.raises(UsageError, match=words) as caught:
        plan_before_survey(row, as_method(recipe), sizes, Budget(total, most + 0.01))
    largest = float(str(caught.value).rsplit(" ", 1)[1])
    assert most - 0.001 <= largest <= most


def ranks(config, ratio: float, round_to: int = 1) -> int:
    """Rank of the corrections of a model."""
    return Corrections(1, ratio, last_is_eligible=False).rank(Sizes.of(config), round_to)


def test_a_ratio_that_leaves_no_rank_is_refused():
    sizes = layers_of(make_llama().config)
    with pytest.raises(UsageError, match=r"--ratio 0.01 of the hidden size 64 .*0.0156, or --mlp_num 0"):
        Corrections(1, 0.01, last_is_eligible=False).check(sizes)
    Corrections(1, 1 / 64, last_is_eligible=False).check(sizes)
    Corrections(0, 0.01, last_is_eligible=False).check(sizes)


@pytest.mark.parametrize(("last_is_eligible", "most"), [(False, 2), (True, 3)])
def test_the_number_of_corrections_is_checked_against_the_layers(last_is_eligible, most):
    sizes = layers_of(make_llama().config)
    Corrections(most, 0.1, last_is_eligible).check(sizes)
    for number, nearest in ((most + 1, most), (-1, 0)):
        words = rf"--mlp_num {number} .*3 layers .*0 to {most}.*; give --mlp_num {nearest}$"
        with pytest.raises(UsageError, match=words) as caught:
            Corrections(number, 0.1, last_is_eligible).check(sizes)
        assert ("never corrects the last" in str(caught.value)) != last_is_eligible
        assert "default" not in str(caught.value)


def test_a_default_number_of_corrections_that_does_not_fit_is_called_one():
    assert OlicaParameters().mlp_num == 6, "as in the released code"
    with pytest.raises(UsageError, match=r"^--mlp_num 6 \(the default\) does not fit: .*; give --mlp_num 2$"):
        Corrections(OlicaParameters().mlp_num, 0.1, last_is_eligible=False).check(layers_of(make_llama().config))


def test_an_mlp_that_keeps_every_channel_gets_no_correction():
    config = make_llama(num_key_value_heads=2).config
    sizes, allocation = layers_of(config), as_method("olica", mlp_num=2).allocate
    budget = Budget(dense_parameters(config), 0.0)
    assert not any(shape.correction_rank for shape in allocation.before_survey(sizes, budget))
    assert not any(shape.correction_rank for shape in allocation(sizes, budget, [{}] * 3))
    assert "no MLP loses a channel, so --mlp_num 2 has no effect" in allocation.notes(sizes, budget)


def test_correction_rank_rounds_down():
    assert ranks(LLAMA_7B, 0.03) == 122
    assert ranks(make_llama().config, 1.0) == 64


def test_correction_rank_can_be_a_multiple():
    assert ranks(LLAMA_7B, 0.03, 1) == 122
    assert ranks(LLAMA_7B, 0.03, 8) == 120 and ranks(LLAMA_7B, 0.03, 32) == 128
    assert ranks(SMOLLM2, 0.03, 64) == 64
    assert ranks(make_llama(hidden_size=72).config, 1.0, 16) == 72


def test_describe_plan_folds_equal_layers():
    plan = [LayerShape(3, 2, 4, 50, correction_rank=rank) for rank in (0, 0, 6, 0)]
    lines = describe_plan(plan).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["0-1", "2", "3"]
    assert lines[2].split()[1:] == ["3", "2", "4", "50", "6"]
    assert len(describe_plan(plan, without=("correction_rank",)).splitlines()) == 2


@pytest.mark.parametrize("sparsity", [0.05, 0.1, 0.2, 0.3, 0.45])
def test_rounding_layers_that_are_alike_keeps_to_the_budget(sparsity):
    """A threshold takes as many channels from each, and rounding every one to the same side would add up."""
    sizes, draw = layers_of(SMOLLM2), torch.Generator().manual_seed(0)
    findings = [{"heads": torch.rand(3, generator=draw), "channels": torch.rand(1536, generator=draw)} for _ in sizes]
    allocate = GlobalThreshold(lambda found: (found["heads"], found["channels"]), biases=False)
    whole = dense_parameters(SMOLLM2, "decoder_layers")
    plan = allocate(sizes, Budget(whole, sparsity, round_to=64), findings)
    # Of a group of three heads of width 64 the queries, their outputs, the keys and the values; of a channel three.
    lost = sum(
        (3 - (shape.kv_heads or 3)) * 576 * 64 * (3 + 3 + 1 + 1) + (1536 - shape.intermediate_size) * 576 * 3
        for shape in plan
    )
    assert all(shape.intermediate_size % 64 == 0 and shape.intermediate_size > 0 for shape in plan)
    assert lost / whole == pytest.approx(sparsity, abs=0.005)
