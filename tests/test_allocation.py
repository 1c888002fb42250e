import pytest
from conftest import make_llama
from transformers import Gemma3TextConfig, LlamaConfig

from olica.errors import UsageError
from olica.methods.allocation import (
    FEWEST_ALONE,
    LEAST_ALONE,
    MOST_ALONE,
    RELEASED_SPLIT,
    Sizes,
    allocate,
    attention_parameters,
    correction_rank,
    describe_plan,
    factor_rank,
    grouped_sparsities,
    jumps,
    paper_sparsities,
    released_sparsities,
    round_shape,
    uniform_shape,
    with_corrections,
)
from olica.methods.recipes import RECIPES
from olica.model.configuration_olica import LayerShape
from olica.model.skeleton import pruned_skeleton
from olica.sources.configuration import count_dense_parameters
from olica.sources.locate import Location

LLAMA_7B = LlamaConfig()  # the defaults of the class are LLaMA-7B
OLICA = RECIPES["olica"]


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
    sizes = Sizes.of(LLAMA_7B, dense_parameters(LLAMA_7B))
    below, above = released_sparsities(sizes, 0.4, 2.0), released_sparsities(sizes, 0.41, 2.0)
    assert below.query == below.key == pytest.approx(0.8)
    assert above.query == above.key == pytest.approx(2 * above.value_output)
    for shares, target in ((below, 0.4), (above, 0.41)):
        layer = sum(getattr(sizes, name) * share for name, share in vars(shares).items())
        assert sizes.layers * layer == pytest.approx(target * sizes.total)


def test_the_papers_rule_scales_the_target_to_what_is_prunable():
    sizes = Sizes(total=1000, query=10, key=10, value_output=20, feed_forward=120, layers=5)
    shares = paper_sparsities(sizes, 0.2, 3.0)
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
    sizes = Sizes.of(SMOLLM2, dense_parameters(SMOLLM2))
    shares, released = grouped_sparsities(sizes, sparsity, 3.0), released_sparsities(sizes, sparsity, 3.0)
    assert (shares.query, shares.key) == (pytest.approx(query), pytest.approx(key))
    assert shares.value_output == released.value_output and shares.feed_forward >= 0
    layer = sum(getattr(sizes, name) * share for name, share in vars(shares).items())
    assert sizes.layers * layer == pytest.approx(sparsity * sizes.total)
    # Where no limit is in the way, the queries lose just what both lost together.
    assert (shares.feed_forward == pytest.approx(released.feed_forward)) == (sparsity > 0.2)


def test_a_hair_too_much_makes_no_factors_of_the_keys():
    config = make_llama(num_key_value_heads=2).config  # half as many as query heads: q loses three times the sparsity
    plan, shares = allocate("olica-grouped", config, dense_parameters(config), MOST_ALONE / 3, 3.0)
    assert plan[0].k_rank == 0 and shares.query == pytest.approx(MOST_ALONE)


@pytest.mark.parametrize("config", [SMOLLM2, LLAMA3_8B, GEMMA3_270M], ids=["smollm2", "llama3-8b", "gemma3-270m"])
def test_keys_take_over_from_queries_without_a_jump(config):
    sizes = Sizes.of(config, dense_parameters(config, "decoder_layers"))
    ratio, before = sizes.key / sizes.query, None
    for thousandths in range(1, 400):
        sparsity = thousandths / 1000
        shares = grouped_sparsities(sizes, sparsity, 3.0)
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
    grouped, total = RECIPES["olica-grouped"], dense_parameters(SMOLLM2)
    assert jumps(grouped, SMOLLM2, total, 0.1, 3.0) == jumps(OLICA, SMOLLM2, total, 0.2, 3.0) == []
    (words,) = jumps(grouped, SMOLLM2, total, 0.01, 3.0)
    assert words == "at --sparsity 0.02 the rank of q is 214, here 576"
    (words,) = jumps(grouped, SMOLLM2, total, 0.26, 3.0)  # next, queries lose MOST_ALONE and keys what is missing
    assert words.startswith("at --sparsity 0.27 the rank of k is ") and words.endswith(", here 192")
    (words,) = jumps(OLICA, SMOLLM2, total, RELEASED_SPLIT, 3.0)
    assert words == "at --sparsity 0.41 the rank of q is 111, here 58, the rank of k is 56, here 29"
    assert jumps(OLICA, SMOLLM2, total, 0.0, 3.0)[0].startswith("at --sparsity 0.01 the rank of q is 283, here 576")


def test_where_attention_is_wide_the_mlps_never_grow_for_it():
    sizes = Sizes(total=1000, query=100, key=50, value_output=100, feed_forward=50, layers=2)
    shares = grouped_sparsities(sizes, 0.1, 3.0)
    assert shares.query == pytest.approx(0.45) and (shares.key, shares.feed_forward) == (0, pytest.approx(0))
    assert shares.feed_forward >= 0


def test_ungrouped_heads_get_the_released_shares():
    sizes = Sizes.of(LLAMA_7B, dense_parameters(LLAMA_7B))
    for sparsity in (0.02, 0.1, 0.2, 0.33, 0.5):
        assert grouped_sparsities(sizes, sparsity, 3.0) == released_sparsities(sizes, sparsity, 3.0)


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


@pytest.mark.parametrize("recipe", [*RECIPES])
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
        sizes = Sizes.of(config, dense_parameters(config))
        exact = uniform_shape(config, OLICA.sparsities(sizes, sparsity, 3.0), OLICA.kept)
        assert round_shape(exact, config, 1) == exact
        assert allocate("olica", config, sizes.total, sparsity, 3.0, 1)[0][0] == exact


def test_rounding_leaves_dense_what_is_dense_or_would_not_shrink():
    config = make_llama(intermediate_size=177).config  # heads 4 of 16, hidden size 64: 32 is the break-even of a rank
    assert round_shape(LayerShape(0, 0, 16, 177), config, 8) == LayerShape(0, 0, 16, 177)
    shape = round_shape(LayerShape(30, 27, 15, 100), config, 8)
    assert (shape.q_rank, shape.k_rank, shape.v_head_dim) == (0, 24, 16)
    grown = 64 * (64 - 30 * 2) + 64 * (24 - 27) * 2 + 2 * 64 * 4  # parameters of q, of k, of v and o
    assert shape.intermediate_size == 8 * round((100 - grown / (3 * 64)) / 8)
    assert round_shape(LayerShape(3, 3, 2, 100), config, 16) == LayerShape(16, 16, 16, 48)


def test_attention_parameters_are_those_of_the_modules():
    config = make_llama(num_key_value_heads=2).config
    for shape in (LayerShape(0, 0, 16, 100), LayerShape(20, 0, 9, 100), LayerShape(20, 10, 9, 100)):
        assert attention_parameters(config, shape) == layer_parameters(config, shape) - 3 * 64 * 100


@pytest.mark.parametrize("round_to", [-8, 0, 17])
def test_rounding_that_no_head_allows_is_refused(round_to):
    config = make_llama().config
    with pytest.raises(UsageError, match=rf"--round_to {round_to} is outside 1 to 16, the width"):
        allocate("olica", config, dense_parameters(config), 0.2, 3.0, round_to)


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


def test_a_ratio_that_leaves_no_rank_is_refused():
    with pytest.raises(UsageError, match=r"--ratio 0.01 of the hidden size 64 .*0.0156, or --mlp_num 0"):
        correction_rank(make_llama().config, 0.01)


def test_calibration_rank_rounds_down():
    assert correction_rank(LLAMA_7B, 0.03) == 122
    assert correction_rank(make_llama().config, 1.0) == 64


def test_calibration_rank_can_be_a_multiple():
    assert correction_rank(LLAMA_7B, 0.03, 1) == 122
    assert correction_rank(LLAMA_7B, 0.03, 8) == 120 and correction_rank(LLAMA_7B, 0.03, 32) == 128
    assert correction_rank(SMOLLM2, 0.03, 64) == 64
    assert correction_rank(make_llama(hidden_size=72).config, 1.0, 16) == 72


def test_describe_plan_folds_equal_layers():
    plan = with_corrections([LayerShape(3, 2, 4, 50)] * 4, [2], 6)
    lines = describe_plan(plan).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["0-1", "2", "3"]
    assert lines[2].split()[1:] == ["3", "2", "4", "50", "6"]
