"""Folders of transformers that hold a compressed file: bit by bit what was compressed, as small as the file, and never silently wrong."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import transquant as tq
from blocks import need, offline
from transquant.errors import CorruptFile, FileError, InputError
from zoo import declare_vision_ops, walks

need("transformers")
declare_vision_ops()
transformers = importlib.import_module("transformers")
hf = tq.integrations.transformers


def gpt2(**options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256,
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.1,
        **options,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return transformers.BertForMaskedLM(config).eval()


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    return transformers.ViTForImageClassification(config).eval()


MODELS = {
    "gpt2": (gpt2, "AutoModelForCausalLM"),
    "bert": (bert, "AutoModelForMaskedLM"),
    "vit": (vit, "AutoModelForImageClassification"),
}


@pytest.fixture(scope="module")
def small():
    """A compressed GPT-2; not to be changed."""
    return hf.compress(gpt2(), bits=4.0, effort=1)


@pytest.fixture
def folder(small, tmp_path):
    small.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_same_state_dict_and_is_as_small_as_the_file(name, tmp_path):
    make, auto = MODELS[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    small = hf.compress(model, bits=5.0, effort=1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # which is not changed
    assert not hasattr(model, "hf_quantizer")
    small.save_pretrained(tmp_path)
    compressed = small.hf_quantizer.compressed
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert 0 < sizes.pop("model.safetensors") - len(compressed.data) <= 400
    assert all(k.endswith(".json") for k in sizes)
    assert sum(sizes.values()) < 4000
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {"bits": 5.0, "quant_method": "transquant"}
    again, info = getattr(transformers, auto).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert same(small, again)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in compressed.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(buffers(model), buffers(again), strict=True))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def buffers(model):
    """Those outside the state dict too, which transformers makes anew."""
    return [b for _, b in sorted(model.named_buffers())]


def test_tied_weights_stay_tied(small, folder):
    assert small.lm_head.weight is small.transformer.wte.weight
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert again.lm_head.weight is again.transformer.wte.weight
    with torch.no_grad():
        assert torch.equal(small(torch.arange(8)[None]).logits, again(torch.arange(8)[None]).logits)


def test_untied_weights_stay_untied(tmp_path):
    hf.compress(gpt2(tie_word_embeddings=False), bits=5.0, effort=1).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(again.lm_head.weight, again.transformer.wte.weight)


def test_compressed_while_loading(tmp_path):
    """The same file as that of the model in memory, from samples that can be had once, and none of them in config.json."""
    model, samples = gpt2(), walks(40, 32, 256, 1)
    model.save_pretrained(tmp_path / "float")
    config = hf.TransquantConfig((batch for batch in samples.split(8)), bits=4.0, effort=1)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert loaded.hf_quantizer.compressed.data == tq.compress(model, samples.split(8), bits=4.0, effort=1).data
    loaded.save_pretrained(tmp_path / "small")
    written = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert written == {"bits": 4.0, "effort": 1, "quant_method": "transquant"}
    assert same(loaded, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small"))


def test_a_file_from_elsewhere(small, tmp_path):
    small.hf_quantizer.compressed.save(tmp_path / "net.tq")
    model = hf.attach(gpt2(), tq.load(tmp_path / "net.tq"))
    model.save_pretrained(tmp_path / "folder")
    assert same(small, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder"))


def t5():
    """Layers that transformers keeps in float32, and one embedding in three places."""
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config).half()


def mixtral():
    """Float folders have a tensor for each expert; the model, and so the compressed file, one for all of them."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    return transformers.MixtralForCausalLM(config)


@pytest.mark.parametrize("make", [t5, mixtral])
def test_models_that_are_not_loaded_as_they_are_saved(make, tmp_path):
    small = hf.compress(make(), step=1e-4)
    small.save_pretrained(tmp_path / "small")
    again = type(small).from_pretrained(tmp_path / "small")
    assert same(small, again)
    again.save_pretrained(tmp_path / "again")
    assert same(small, type(small).from_pretrained(tmp_path / "again"))
    again.dequantize().save_pretrained(tmp_path / "float")
    assert same(small.dequantize().to(torch.float32), type(small).from_pretrained(tmp_path / "float").to(torch.float32))
    config = hf.TransquantConfig(step=1e-4)
    loaded = type(small).from_pretrained(tmp_path / "float", quantization_config=config)
    loaded.save_pretrained(tmp_path / "loaded")
    assert same(loaded, type(small).from_pretrained(tmp_path / "loaded"))


def test_half_precision(tmp_path):
    small = hf.compress(gpt2().to(torch.bfloat16), bits=5.0, effort=1)
    small.save_pretrained(tmp_path)
    assert same(small, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert same(small, wide.dequantize().to(torch.bfloat16))


def test_models_with_and_without_a_head(small, folder):
    base = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(base.wte.weight, small.transformer.wte.weight)
    other, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert torch.equal(other.transformer.wte.weight, small.transformer.wte.weight)
    with pytest.raises(InputError, match="dequantize"):
        other.save_pretrained(folder.parent / "other")


def test_dequantized_models_are_ordinary(small, folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).dequantize()
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    assert set(load_file(tmp_path / "float" / "model.safetensors")) == set(small.state_dict()) - {"lm_head.weight"}
    assert same(small, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float"))


def test_changed_weights_are_not_saved(folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.h[1].ln_1.bias[3] += 1
    with pytest.raises(InputError, match=r"'transformer\.h\.1\.ln_1\.bias' is no longer"):
        model.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / "model.safetensors").exists()
    again = hf.compress(model, bits=5.0, effort=1)  # from what it is now
    again.save_pretrained(tmp_path / "changed")
    assert (tmp_path / "changed" / "model.safetensors").exists()


def test_without_the_import_transformers_stops(folder, tmp_path):
    """Random weights would be the worst of answers."""
    code = f"import transformers\ntransformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    environment = {**offline(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Unknown quantization type, got transquant" in done.stderr
    assert "mismatched" in done.stderr


def test_damaged_folders_are_bad_files(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(CorruptFile, match="checksum"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    ((name, data),) = ((k, v) for k, v in load_file(path).items())
    save_file({name: data[:100]}, path)
    with pytest.raises(FileError):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    save_file({name: torch.zeros(4, 4)}, path)
    with pytest.raises(InputError, match="expected one of bytes"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_file_of_another_network_is_refused(folder, tmp_path):
    bert().config.save_pretrained(tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "transquant"}}))
    with pytest.raises(InputError, match="another network than BertForMaskedLM"):
        transformers.BertForMaskedLM.from_pretrained(folder)
    with pytest.raises(InputError, match="do not fit the model"):
        hf.attach(bert(), tq.compress(gpt2(), bits=5.0, effort=1))


def test_bad_input(small, tmp_path):
    with pytest.raises(InputError, match="model is a Linear, allowed are models of transformers"):
        hf.compress(torch.nn.Linear(3, 3), bits=4)
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no option 'bit', allowed are bits, size"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=hf.TransquantConfig(bit=4))
    with pytest.raises(InputError, match="target"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=hf.TransquantConfig())
    other = gpt2()
    other.quantization_method = "gptq"
    with pytest.raises(InputError, match="quantized already, by gptq"):
        hf.compress(other, bits=4)
