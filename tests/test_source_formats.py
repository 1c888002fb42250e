"""Every form in which users have dense models: weight files, dtypes, tokenizers, GGUF."""

import json
import re
from pathlib import Path

import pytest
import sentencepiece
import torch
from called import call
from conftest import hub_snapshot, make_llama, make_tokenizer, prune_to, refused, save_bin, write_pruned
from safetensors.torch import save_file
from tiny_families import make_family
from tiny_gguf import GEMMA_PIECES, GGUF_FAMILIES, GGUF_SIZES, LLAMA_PIECES, train_sentencepiece, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, PreTrainedModel

import model_pruning
from olica.errors import UsageError
from olica.machine import BatchSize
from olica.model.configuration_olica import LayerShape
from olica.sources.configuration import count_dense_parameters, describe_source, read_config
from olica.sources.locate import locate
from olica.sources.tokenizers import read_tokenizer, tokens_of_probes
from olica.sources.weights import read_model

IDS = torch.randint(3, 250, (6, 20), generator=torch.Generator().manual_seed(0))


def save_safetensors(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def save_sharded_safetensors(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1


def save_sharded_bin(model: PreTrainedModel, folder: Path) -> None:
    save_bin(model, folder, shards=2)


@pytest.mark.parametrize(
    ("save", "dtype"),
    [
        *((save, torch.bfloat16) for save in (save_safetensors, save_sharded_safetensors, save_bin, save_sharded_bin)),
        (save_safetensors, torch.float32),
        (save_safetensors, torch.float16),
    ],
)
def test_weight_files_are_pruned_and_saved_in_their_dtype(save, dtype, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama(num_key_value_heads=2).to(dtype).save_pretrained("original")
    model = AutoModelForCausalLM.from_pretrained("original")
    assert model.dtype == dtype
    save(model, tmp_path / "dense")
    save_file({"calibration_ids": IDS}, "ids.safetensors")
    arguments = "--base_model=dense --datasets=ids.safetensors --mlp_num=1 --ratio=0.1 --sparsity=0.2".split()
    call(model_pruning, *arguments)
    pruned = AutoModelForCausalLM.from_pretrained("pruned_models/dense_sparsity-0.2")
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    plan = [LayerShape(**shape) for shape in pruned.config.layer_shapes]
    prune_to(model, IDS, plan, batch_size=BatchSize(16))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, pruned.state_dict()[name]), name


@pytest.mark.parametrize(
    ("family", "pieces"),
    [("llama", LLAMA_PIECES), ("mistral", LLAMA_PIECES), ("phi3", LLAMA_PIECES), ("gemma2", GEMMA_PIECES),
     ("gemma3_text", GEMMA_PIECES)],
)  # fmt: skip
def test_a_tokenizer_in_sentencepiece_form_only(family, pieces, tmp_path):
    model, plan = make_family(family, vocab_size=500), [LayerShape(0, 0, 9, 101)] * 3
    model.save_pretrained(tmp_path / "dense")
    train_sentencepiece(tmp_path / "dense", **pieces)
    tokenizer = read_tokenizer(locate(str(tmp_path / "dense")))
    prune_to(model, IDS, plan)
    write_pruned(model, plan, tokenizer, tmp_path / "pruned")
    saved = AutoTokenizer.from_pretrained(tmp_path / "pruned")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "dense" / "tokenizer.model"))
    for text in ("Pruned models load like any other.", "two  spaces, a quick brown fox and ü", "x"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == saved(text, add_special_tokens=False).input_ids == reference.encode(text)
        assert tokenizer(text).input_ids == saved(text).input_ids == [reference.bos_id(), *ids]
        assert tokenizer.decode(ids) == text


def test_a_sentencepiece_file_that_cannot_be_followed_is_refused(saved_llama):
    (saved_llama / "tokenizer.json").unlink()
    (saved_llama / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UsageError, match="its tokenizer cannot be read"):
        read_tokenizer(locate(str(saved_llama)))


@pytest.mark.parametrize(
    ("family", "tied"),
    [(family, tied) for family in GGUF_FAMILIES for tied in (True, False) if tied or family != "gemma2"],
)  # GGUF knows a Gemma 2 with tied embeddings only
def test_gguf_is_dequantised_and_pruned(family, tied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    architecture, overrides = GGUF_FAMILIES[family]
    dense = make_family(family, tied=tied, peculiar=False, **GGUF_SIZES | overrides)
    write_gguf(dense, architecture, tmp_path / "tiny.gguf")
    location = locate("tiny.gguf")
    config = read_config(location)
    assert config.model_type == ("llama" if architecture == "llama" else family)
    assert count_dense_parameters(location, config)["total"] == dense.num_parameters()
    model = read_model(location)
    assert model.dtype == torch.float32
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    save_file({"calibration_ids": IDS}, "ids.safetensors")
    arguments = "--base_model=tiny.gguf --datasets=ids.safetensors --mlp_num=1 --ratio=0.1 --sparsity=0.2".split()
    call(model_pruning, *arguments)
    pruned = AutoModelForCausalLM.from_pretrained("pruned_models/tiny_sparsity-0.2").eval()
    prune_to(dense, IDS, [LayerShape(**shape) for shape in pruned.config.layer_shapes])
    torch.testing.assert_close(pruned(IDS).logits, dense(IDS).logits, rtol=1e-3, atol=1e-3)
    saved = AutoTokenizer.from_pretrained("pruned_models/tiny_sparsity-0.2")
    assert saved("abc").input_ids[-2:] == [259, make_tokenizer().get_vocab()["c"]]
    assert tokens_of_probes(saved) == tokens_of_probes(read_tokenizer(location))


PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "architecture", "overrides", "lost"),
    [
        ("llama", "llama", {"rope_parameters": LINEAR}, "rope scaling"),
        ("phi3", "phi3", {"rope_parameters": PARTIAL}, "rope width"),
        ("qwen3", "qwen3", {"head_dim": 32}, "rope width, head width"),
        ("gemma2", "gemma2", {"query_pre_attn_scalar": 16}, "attention scale"),
    ],
)
def test_gguf_whose_settings_would_be_lost_is_refused(family, architecture, overrides, lost, tmp_path):
    dense = make_family(family, tied=True, peculiar=False, **GGUF_SIZES | overrides)
    write_gguf(dense, architecture, tmp_path / "tiny.gguf")
    with pytest.raises(UsageError, match=f"does not take the model's {lost} from a GGUF file"):
        read_config(locate(str(tmp_path / "tiny.gguf")))


def test_the_ending_of_a_gguf_file_may_be_in_capitals(tmp_path):
    dense = make_family("llama", tied=True, peculiar=False, **GGUF_SIZES)
    write_gguf(dense, "llama", tmp_path / "tiny-00001-of-00001.GGUF")
    location = locate(str(tmp_path / "tiny-00001-of-00001.GGUF"))
    assert location.label == "tiny-00001-of-00001"
    assert describe_source(location, read_config(location))["description"] == "Tiny llama, dequantised from Q8_0"
    torch.testing.assert_close(read_model(location)(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["tiny-00001-of-00003.gguf", "tiny-00003-of-00003.gguf", "renamed.gguf"])
def test_one_part_of_a_split_gguf_file_says_how_to_merge_them(name, tmp_path):
    write_gguf(make_family("llama", tied=True, peculiar=False, **GGUF_SIZES), "llama", tmp_path / name, parts=3)
    with pytest.raises(UsageError, match=f"{name}: the file is one part of a split model; .*gguf-split --merge"):
        read_config(locate(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda content: content[:-1000], "its configuration cannot be read; .*it is cut short"),
        (lambda content: content[:500], "its configuration cannot be read; .*it is cut short"),
        (lambda content: content[:4] + b"\4" + content[5:], "its GGUF version is 4, of which we read 2 and 3 only"),
        (lambda content: content.replace(b"qwen2", b"qwen9"), "GGUF model with architecture qwen9 is not supported"),
        (lambda content: content.replace(b"qwen2", b"bloom"), "the family bloom is not supported"),
        (lambda content: content.replace(b"gpt2", b"gpt9"), "its tokenizer cannot be read .*tokenizer 'gpt9'"),
    ],
    ids=["cut in its weights", "cut in its settings", "newer version", "unknown architecture", "another", "tokenizer"],
)
def test_a_gguf_file_that_we_cannot_read_ends_in_a_sentence(damage, fault, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_gguf(make_family("qwen2", tied=True, peculiar=False, **GGUF_SIZES), "qwen2", tmp_path / "tiny.gguf")
    Path("tiny.gguf").write_bytes(damage(Path("tiny.gguf").read_bytes()))
    Path("rows.jsonl").write_text(json.dumps({"text": "some plain words " * 20}) + "\n")
    flags = ["--base_model=tiny.gguf", "--datasets=rows.jsonl", "--num_samples=1", "--seqlen=16", "--mlp_num=1"]
    said = refused(capsys, call, model_pruning, *flags, alone=True)
    assert re.match(f"--base_model tiny.gguf: .*{fault}", said), said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("tiny.gguf", "rows.jsonl")]


def test_a_sentencepiece_file_that_transformers_reads_otherwise_is_refused(tmp_path):
    make_family("llama", vocab_size=500).save_pretrained(tmp_path)
    train_sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc")
    with pytest.raises(UsageError, match="otherwise than SentencePiece"):
        read_tokenizer(locate(str(tmp_path)))


@pytest.mark.parametrize(("settings", "starts"), [({}, True), ({"add_bos_token": True}, True),
                                                  ({"add_bos_token": False}, False)])  # fmt: skip
def test_the_start_token_of_a_sentencepiece_tokenizer(settings, starts, tmp_path):
    make_family("llama", vocab_size=500).save_pretrained(tmp_path)
    train_sentencepiece(tmp_path)
    settings = {"tokenizer_class": "LlamaTokenizer"} | settings
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_tokenizer(locate(str(tmp_path)))
    assert (tokenizer("two words").input_ids[0] == tokenizer.bos_token_id) == starts


EMPTY = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "")
EMPTY_OBJECTS = {name: {"content": "", "lstrip": False, "rstrip": False, "normalized": True} for name in EMPTY}
EMPTY_TYPED = {name: token | {"__type": "AddedToken"} for name, token in EMPTY_OBJECTS.items()}


@pytest.mark.parametrize(
    ("settings", "special_tokens_map", "form"),
    [
        (EMPTY | {"tokenizer_class": "LLaMATokenizer"}, {}, "model"),  # the first conversions of LLaMA
        (EMPTY | {"tokenizer_class": "LlamaTokenizer"}, None, "model"),
        (EMPTY_OBJECTS, EMPTY_OBJECTS, "model"),
        (EMPTY_TYPED | {"pad_token": ""}, None, "model"),
        ({"tokenizer_class": "LlamaTokenizer"}, EMPTY, "model"),
        ({"tokenizer_class": "LlamaTokenizer", "eos_token": ""}, None, "model"),
        (EMPTY | {"tokenizer_class": "LlamaTokenizer"}, EMPTY_OBJECTS, "both"),
        (EMPTY | {"tokenizer_class": "LLaMATokenizer"}, None, "json"),
        (EMPTY | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": ""}, EMPTY, "json"),
    ],
)
def test_special_tokens_that_were_left_empty_are_those_of_the_vocabulary(settings, special_tokens_map, form, tmp_path):
    folder = tmp_path / "old"
    make_family("llama", vocab_size=500).save_pretrained(folder)
    train_sentencepiece(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    if form != "model":
        LlamaTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "new")
        (tmp_path / "new" / "tokenizer.json").rename(folder / "tokenizer.json")
    if form == "json":
        (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if special_tokens_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))
    tokenizer = read_tokenizer(locate(str(folder)))
    tokenizer.save_pretrained(tmp_path / "saved")
    text = "Two words."
    for read in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        ids = (read.unk_token_id, read.bos_token_id, read.eos_token_id)
        assert ids == (reference.unk_id(), reference.bos_id(), reference.eos_id()) == (0, 1, 2)
        assert read.pad_token is None
        assert read(text, add_special_tokens=False).input_ids == reference.encode(text)
        assert read.decode([1, *reference.encode(text), 2], skip_special_tokens=True).strip() == text
    assert (tokenizer(text).input_ids[0] == 1) == (form == "model")


def test_a_pruned_checkpoint_of_the_first_llama_conversions_generates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_llama(num_key_value_heads=2, vocab_size=500).save_pretrained("old")
    train_sentencepiece(tmp_path / "old")
    Path("old/tokenizer_config.json").write_text(json.dumps(EMPTY | {"tokenizer_class": "LLaMATokenizer"}))
    ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=-1)
    old = {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048}
    config = json.loads(Path("old/config.json").read_text())
    Path("old/config.json").write_text(json.dumps(config | ids | old))
    Path("rows.jsonl").write_text("".join(json.dumps({"text": "some plain words " * 20}) + "\n" for _ in range(8)))
    flags = "--base_model=old --datasets=rows.jsonl --num_samples=4 --seqlen=16 --mlp_num=1 --ratio=0.1".split()
    assert call(model_pruning, *flags) == 0
    tokenizer = AutoTokenizer.from_pretrained("pruned_models/old_sparsity-0.2")
    model = AutoModelForCausalLM.from_pretrained("pruned_models/old_sparsity-0.2")
    prompt = tokenizer("some plain", return_tensors="pt")
    assert prompt.input_ids[0, 0] == tokenizer.bos_token_id == 1
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    whole = model.generate(**prompt, **settings, eos_token_id=tokenizer.eos_token_id)
    ended = model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=int(whole[0, -4]))
    assert ended.shape[1] == prompt.input_ids.shape[1] + 1


def test_a_tokenizer_of_the_hub_in_sentencepiece_form(tmp_path, monkeypatch):
    snapshot = hub_snapshot(tmp_path)
    make_family("llama", vocab_size=500).save_pretrained(snapshot)
    train_sentencepiece(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    tokenizer = read_tokenizer(locate("team/model"))
    assert tokenizer.convert_ids_to_tokens(tokenizer("two").input_ids)[0] == "<s>"
