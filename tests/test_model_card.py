import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from made_records import RECORD, of_recipe

from olica.methods.recipes import RECIPES
from olica.outputs.model_card import CARD, add_metrics, write_card

ASKED = "--sparsity 0.2 --sparsity_of model"
PERPLEXITY = {"value": 15.351, "standard_error": 0.123, "windows": 2000, "seqlen": 128, "bos": "first window"}
SCORES = {"acc": 0.7, "acc_stderr": 0.01, "acc_norm": 0.75, "metrics": ["acc", "acc_norm"]}
SCORES |= {"samples": 200, "split_size": 1838, "num_fewshot": 0}


def measured(start_token: bool = False, **perplexity) -> dict:
    tasks = {"tasks": {"piqa": SCORES}, "harness": "lm-eval 0.4.13", "add_bos_token": start_token}
    return {"dtype": "float16", "perplexity": {"wikitext2": PERPLEXITY | perplexity}, "zero_shot": tasks}


@pytest.fixture
def folder(tmp_path):
    write_card(tmp_path, RECORD)
    return tmp_path


def text(folder: Path) -> str:
    return (folder / CARD).read_text()


def test_the_card_says_what_was_pruned_and_how(folder):
    _, metadata, body = text(folder).split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "base_model": "huggyllama/llama-7b",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["olica", "pruned"],
    }
    for words in ("without 19.8%", "`olica`", f"{ASKED} --k 3 --mlp_num 6 --ratio 0.03 --percdamp 0.5 --seed 0`",
                  "layers 0, 4;", "256 samples of 128 tokens", "huggyllama/llama-7b, pruned without retraining",
                  "(Olica, ICML 2025", "bookcorpus + alpaca",
                  "trust_remote_code=True", "None measured yet."):  # fmt: skip
        assert words in body, words


def test_a_model_that_is_not_of_the_hub_is_no_base_model_of_it(tmp_path):
    model = {"name": "/home/me/models/mine", "source": "/home/me/models/mine", "revision": None}
    write_card(tmp_path, RECORD | {"model": model, "corrected_layers": []})
    assert "base_model" not in text(tmp_path) and "/home" not in text(tmp_path)
    assert "# mine without" in text(tmp_path) and "mine, pruned without retraining" in text(tmp_path)


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        ({"license": "apache-2.0"}, "too: apache-2.0."),
        (
            {"license": "other", "license_name": "own", "license_link": "https://a.b/c"},
            "too: other, own, https://a.b/c.",
        ),
        ({}, "too: its files here do not name it."),
    ],
)
def test_the_card_carries_the_licence_and_the_revision_of_the_dense_model(tmp_path, licence, words):
    write_card(tmp_path, RECORD | {"model": RECORD["model"] | {"licence": licence}})
    _, metadata, body = text(tmp_path).split("---\n", 2)
    found = yaml.safe_load(metadata)
    assert {name: value for name, value in found.items() if name.startswith("license")} == licence
    assert f"at revision `{'0' * 40}`, whose licence holds for them {words}" in body


@pytest.mark.parametrize(
    ("revision", "link"),
    [("1" * 40, f"https://huggingface.co/huggyllama/llama-7b/blob/{'1' * 40}/LICENSE"), (None, None)],
)
def test_a_licence_beside_the_dense_model_is_linked_where_it_lies(tmp_path, revision, link):
    licence = {"license": "other", "license_link": "LICENSE"}
    write_card(tmp_path, RECORD | {"model": RECORD["model"] | {"licence": licence, "revision": revision}})
    assert yaml.safe_load(text(tmp_path).split("---\n")[1]).get("license_link") == link


@pytest.mark.parametrize(("layout", "has_code"), [("stock", False), ("dense", False), ("deci", True)])
def test_the_card_of_an_export_says_its_layout_and_how_it_loads(tmp_path, layout, has_code):
    write_card(tmp_path, RECORD | {"exported": layout})
    assert f"Written in the layout `{layout}` afterwards: " in text(tmp_path)
    assert ("trust_remote_code=True" in text(tmp_path)) == has_code


def test_the_card_says_which_model_a_name_stands_for(tmp_path):
    write_card(tmp_path, RECORD | {"model": RECORD["model"] | {"description": "The Model, dequantised"}})
    assert "The Model, dequantised, pruned without retraining" in text(tmp_path)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"corrected_layers": []}, f"`{ASKED} --k 3 --seed 0`;\nno corrections (no MLP lost a channel, so "
                                    "`--mlp_num 6` had no effect);"),
        ({"corrected_layers": [], "settings": {"mlp_num": 0}}, f"`{ASKED} --k 3 --seed 0`;\nno corrections;"),
        ({"settings": {"round_to": 8}}, "--k 3 --round_to 8 --mlp_num 6"),
        ({"settings": {"datasets": "ids.safetensors"}}, "--percdamp 0.5`;"),
        ({"settings": {"sparsity": 0.0, "round_to": 8}, "parameters": {"after": 10}, "corrected_layers": []},
         "`--sparsity 0 --sparsity_of model --seed 0`;"),
    ],
)  # fmt: skip
def test_the_card_names_the_flags_that_had_an_effect(tmp_path, changed, expected):
    merged = {key: RECORD[key] | value if isinstance(value, dict) else value for key, value in changed.items()}
    write_card(tmp_path, RECORD | merged)
    assert expected in text(tmp_path)


def test_metrics_are_added_with_their_protocol_and_replaced(folder):
    add_metrics(folder, measured())
    name = "- perplexity on wikitext2, 2000 windows of 128 tokens, start token: first window, float16"
    assert f"{name}: 15.35 ± 0.12\n" in text(folder) and "None measured" not in text(folder)
    protocol = "200 of 1838 rows, 0 examples, without start token, lm-eval 0.4.13, float16"
    assert f"- piqa acc, {protocol}: 0.7000 ± 0.0100\n" in text(folder)
    assert f"- piqa acc_norm, {protocol}: 0.7500\n" in text(folder)
    add_metrics(folder, measured(value=16.0))
    assert f"{name}: 16.00 ± 0.12\n" in text(folder) and "15.35" not in text(folder)
    add_metrics(folder, measured(windows=100))
    assert "2000 windows" in text(folder) and "100 windows" in text(folder)
    assert text(folder).split("## Metrics")[1].count("\n- ") == 4
    add_metrics(folder, measured(start_token=True))
    assert text(folder).count("- piqa acc,") == 2, "with and without start token are two figures"
    by_chat = measured()
    by_chat["zero_shot"]["apply_chat_template"] = True
    add_metrics(folder, by_chat)
    assert text(folder).count("- piqa acc,") == 3 and ", without start token, by the chat template, " in text(folder)


def test_figures_that_are_added_at_the_same_time_are_all_there(folder):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda windows: add_metrics(folder, measured(windows=windows)), range(1000, 1040)))
    assert text(folder).count("\n- perplexity on wikitext2") == 40
    assert [path.name for path in folder.iterdir()] == [CARD]


def test_a_card_that_cannot_be_written_is_left_alone(folder, monkeypatch):
    before = text(folder)
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)
    add_metrics(folder, measured())
    assert text(folder) == before


def test_what_was_written_into_the_card_by_hand_stays(folder):
    with (folder / CARD).open("a") as card:
        card.write("- mine\n\n## Notes\n\n- mine too: yes\n")
    add_metrics(folder, measured())
    assert text(folder).endswith("\n## Notes\n\n- mine too: yes\n") and "15.35" in text(folder)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({}, "low-rank query projections, narrower value heads, narrower MLPs, low-rank linear corrections"),
        ({"k_rank": 4, "correction_rank": 0}, "low-rank query and key projections, narrower value heads,"),
        ({"v_rank": 4, "o_rank": 4, "v_head_dim": 10}, "low-rank query and value and output projections, narrower MLP"),
        ({"q_rank": 0, "v_head_dim": 10}, "narrower MLPs, low-rank linear corrections beside some MLPs."),
        ({"intermediate_size": 12, "correction_rank": 0}, "low-rank query projections, narrower value heads."),
        ({"q_rank": 0, "v_head_dim": 10, "intermediate_size": 12, "correction_rank": 0}, "no size changed."),
        ({"q_rank": 0, "v_head_dim": 10, "correction_rank": 0, "kv_heads": 2, "down_bias": True},
         "narrower MLPs, fewer attention heads, output biases for what is gone."),
        ({"q_rank": 0, "v_head_dim": 10, "intermediate_size": 12, "correction_rank": 0, "kv_heads": 1, "o_bias": True},
         "fewer attention heads, output biases for what is gone."),
    ],
)  # fmt: skip
def test_the_card_says_what_became_of_the_projections(tmp_path, shape, words):
    write_card(tmp_path, RECORD | {"plan": [RECORD["plan"][0] | shape]})
    assert f"without retraining (Olica, ICML 2025: the released code's arithmetic): {words}" in text(tmp_path)


@pytest.mark.parametrize("recipe", ["magnitude", "flap"])
def test_a_recipe_without_parameters_names_none(tmp_path, recipe):
    settings = {name: RECORD["settings"][name] for name in ("sparsity", "seed", "sparsity_of", "round_to", "datasets")}
    changed = {"recipe": of_recipe(recipe), "settings": settings | {"recipe": recipe}, "corrected_layers": []}
    write_card(tmp_path, RECORD | changed)
    assert f"Recipe `{recipe}` with `{ASKED} --seed 0`;\ncalibrated on 256 samples" in text(tmp_path)
    assert "correction" not in text(tmp_path).split("Recipe")[1]
    assert f"({RECIPES[recipe].about})" in text(tmp_path) and "Olica, ICML" not in text(tmp_path)


def test_a_recipe_of_another_kind_names_all_of_its_parameters(tmp_path):
    recipe = {"name": "mine", "about": "mine", "parameters": ["spared", "percdamp", "order"]}
    settings = RECORD["settings"] | {"recipe": "mine", "spared": 2, "order": "up"}
    write_card(tmp_path, RECORD | {"recipe": recipe, "settings": settings, "corrected_layers": []})
    words = f"Recipe `mine` with `{ASKED} --spared 2 --percdamp 0.5 --order up --seed 0`;\ncalibrated on 256 samples"
    assert words in text(tmp_path)


def test_another_card_is_left_alone(folder):
    add_metrics(folder / "nowhere", measured())
    (folder / CARD).write_text("mine\n")
    add_metrics(folder, measured())
    assert text(folder) == "mine\n"
