"""Checkpoints of format 1, which commit 033ce24 wrote, and the logits that it computed on fixed ids in float32.

Tiny models of every family, stored in bfloat16; the first layer of each has a correction. One has its own copies of
the modelling files, as every published checkpoint has.
"""

import json
import os
import subprocess

import pytest
import torch
from conftest import TEST_DATA
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from olica.model.configuration_olica import FORMAT
from olica.model.families import FAMILIES

FOLDER = TEST_DATA / "checkpoints"
STORED = load_file(FOLDER / "logits.safetensors")


def test_the_folder_has_every_family_in_the_old_form():
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == set(FAMILIES) == STORED.keys() - {"ids"}
    for family in FAMILIES:
        config = json.loads((FOLDER / family / "config.json").read_text())
        assert [shape["calibration_rank"] for shape in config["layer_shapes"]] == [3, 0]
        assert "olica_format" not in config


@pytest.mark.parametrize("family", FAMILIES)
def test_loads_and_computes_what_it_did(family, tmp_path):
    model, info = AutoModelForCausalLM.from_pretrained(FOLDER / family, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(model(STORED["ids"]).logits, STORED[family], rtol=1e-4, atol=1e-4)
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["olica_format"] == FORMAT == 2
    assert [shape["correction_rank"] for shape in written["layer_shapes"]] == [3, 0]
    assert not any("calibration_rank" in shape for shape in written["layer_shapes"])
    assert AutoConfig.from_pretrained(tmp_path).layer_shapes == model.config.layer_shapes


BY_ITS_OWN_FILES = """
import importlib.util, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
sys.modules["olica"] = None  # whoever imports it fails, as where it is not installed
folder, logits = sys.argv[1:]
stored = load_file(logits)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
torch.testing.assert_close(model(stored["ids"]).logits, stored["llama"], rtol=1e-4, atol=1e-4)
print(type(model).__module__)
"""


def test_loads_by_its_own_old_files(tmp_path, fast_python):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "HF_HOME": str(tmp_path)
    }
    command = [fast_python, "-c", BY_ITS_OWN_FILES, FOLDER / "llama", FOLDER / "logits.safetensors"]
    run = subprocess.run(map(str, command), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("transformers_modules.")
